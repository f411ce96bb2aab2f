"""The resident trainer as a real process: same answers, kept, and gone when it should be."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import fedllm_flwr
from fedllm_flwr.client.processes import processes
from fedllm_flwr.client.requests import answer
from fedllm_flwr.client.resident.caller import answer_by_resident
from fedllm_flwr.client.site import Site
from fedllm_flwr.config.compose import compose
from fedllm_flwr.federation.messages import Assignment
from fedllm_flwr.federation.wire import (
    pack_assignment,
    pack_query,
    unpack_failure,
    unpack_info,
    unpack_update,
)
from fedllm_flwr.models.adapted_model import load_model
from tiny_runs import tiny

DEMO = Path(fedllm_flwr.__file__).parent / "assets" / "demo" / "test.jsonl"
CONFIG = compose(tiny("federation.engine=deployment", "communication=float32"))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A site whose sockets and state lie in a directory of the test's own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.getppid", os.getpid)  # the SuperNode of this test
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    policy = tmp_path / "policy.yaml"
    policy.write_text("min_records_per_step: 1\nmin_records_per_round: 1\napproval: automatic\n")
    node = {"client-name": "ward", "data-path": str(DEMO), "state-dir": str(tmp_path)}
    yield Site({**node, "policy-path": str(policy)}, 1, 7)
    for process in residents(tmp_path):
        process.kill()
        process.wait()


def residents(folder: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in part for part in process.info["cmdline"] or [])
    ]


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)
    return holds()


@pytest.mark.slow  # imports torch in the trainer
def test_same_update_as_in_process_and_the_process_stays(site: Site, tmp_path: Path) -> None:
    content = pack_assignment(Assignment(1, load_model(CONFIG).initial, 5e-3, CONFIG))

    info = unpack_info(answer_by_resident("query", pack_query(CONFIG), site))
    assert (info.name, info.num_examples) == ("ward", 360)
    update = unpack_update(answer_by_resident("train", content, site))
    expected = unpack_update(answer("train", content, site))
    for name, value in expected.delta.items():
        assert update.delta[name].tobytes() == value.tobytes()

    [process] = residents(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = unpack_update(answer_by_resident("train", content, site))
    assert again.delta.keys() == expected.delta.keys()
    [other] = residents(tmp_path)
    assert other.pid != process.pid


@pytest.mark.slow
def test_two_processes_of_a_site_train_and_end_with_its_trainer(site: Site, tmp_path: Path) -> None:
    """The same bits as with the two processes of another trainer, this one."""
    content = pack_assignment(Assignment(1, load_model(CONFIG).initial, 5e-3, CONFIG))
    two = Site({**site.node_config, "processes": 2}, site.run_id, site.node_id)

    update = unpack_update(answer_by_resident("train", content, two))
    try:
        expected = unpack_update(answer("train", content, two))
    finally:
        processes.end()
    for name, value in expected.delta.items():
        assert update.delta[name].tobytes() == value.tobytes()

    [trainer] = residents(tmp_path)
    [other] = trainer.children()
    trainer.kill()
    trainer.wait()
    assert wait_until(
        lambda: not other.is_running() or other.status() == psutil.STATUS_ZOMBIE, 60.0
    )


def test_a_refusal_comes_back_as_a_failure(site: Site, tmp_path: Path) -> None:
    """A full log is moved aside when a trainer starts."""
    with (tmp_path / "trainer.log").open("wb") as log:
        log.truncate(11 * 2**20)
    simulated = compose(tiny())
    failure = unpack_failure(answer_by_resident("query", pack_query(simulated), site))
    assert failure is not None
    assert "federation.engine=deployment" in failure.reason
    assert (tmp_path / "trainer.log.1").stat().st_size == 11 * 2**20
    assert (tmp_path / "trainer.log").stat().st_size < 2**20


@pytest.mark.slow
def test_it_ends_when_nothing_comes(site: Site, tmp_path: Path) -> None:
    idle = Site({**site.node_config, "idle-timeout-s": 1.5}, 1, 8)
    answer_by_resident("query", pack_query(compose(tiny())), idle)
    assert residents(tmp_path)
    assert wait_until(lambda: not residents(tmp_path))
    assert list(tmp_path.rglob("*.sock")) == []


def test_it_ends_with_its_supernode(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    socket = tmp_path / "x.sock"
    command = [
        sys.executable,
        "-m",
        "fedllm_flwr.client.resident",
        str(socket),
        str(parent.pid),
        "600",
    ]
    with subprocess.Popen(command) as trainer:
        assert wait_until(socket.exists)
        parent.kill()
        parent.wait()
        assert trainer.wait(timeout=30) == 0
    assert not socket.exists()


def test_a_directory_of_others_is_not_used(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"fedllm-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"fedllm-{os.getuid()}").chmod(0o777)

    reply = answer_by_resident("query", pack_query(compose(tiny())), site)

    assert unpack_failure(reply) is not None
    assert "open to others" in caplog.text
    assert residents(tmp_path) == []


def test_it_can_be_switched_off(site: Site, tmp_path: Path) -> None:
    alone = Site({**site.node_config, "resident": False}, 1, 7)
    answer_by_resident("query", pack_query(compose(tiny())), alone)
    assert residents(tmp_path) == []
