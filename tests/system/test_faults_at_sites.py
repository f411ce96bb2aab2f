"""What happens to a site while a run goes on: the round closes without it, and it comes back.

One run of SCAFFOLD, whose sites keep state, goes on through all of it.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest

from breakable import Deployment, Run, deployed, fill, send
from processes import nothing_left, wait_for

pytestmark = pytest.mark.slow

SITES = ("amber", "cedar")
TRAINER = "fedllm_flwr.client.resident"  # module of the resident trainer
TIMEOUT_S = 90  # of a round; a task's time to live is 30 s more


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    root = tmp_path_factory.mktemp("faults")
    with deployed(root, SITES) as deployment:
        yield deployment
    assert nothing_left(root) == []


@pytest.fixture(scope="module")
def run(federation: Deployment) -> Run:
    """It would go on for 500 rounds, and is ended with the federation."""
    run = federation.submit(
        federation.root / "run",
        "algorithm=scaffold",
        "federation.num_rounds=500",
        f"federation.round_timeout_s={TIMEOUT_S}",
    )
    assert run.reaches(1, 400), run.said()
    for name in SITES:  # a first round includes the start of its trainer
        assert recovers(run, name), run.said()
    return run


def fails(run: Run, name: str, after: int, why: str, within_s: float = 240) -> bool:
    """Whether the site is soon named with this reason, and the round used the others' replies."""

    def named() -> list[dict[str, Any]]:
        recorded = [record for record in run.records() if record["round"] > after]
        return [record for record in recorded if why in record["failures"].get(name, "")]

    if not wait_for(lambda: bool(named()), within_s):
        return False
    return bool(named()[0]["clients"]) and named()[0]["loss"] is not None


def waiting(federation: Deployment, name: str) -> list[psutil.Process]:
    """ClientApps of a site that have handed a task to its trainer: they hold a Unix socket."""
    found = []
    for process in federation.processes("--token", name):
        with suppress(psutil.Error):
            if process.net_connections("unix"):
                found.append(process)
    return found


def trainer_of(federation: Deployment, name: str) -> psutil.Process:
    """The resident trainer of a site; its next task starts one if there is none."""
    assert wait_for(lambda: bool(federation.processes(TRAINER, name)), 180)
    [trainer] = federation.processes(TRAINER, name)
    return trainer


def at_work(trainer: psutil.Process) -> bool:
    """Whether it has accepted a connection, besides the socket on which it listens."""
    with suppress(psutil.Error):
        own = [c.laddr for c in trainer.net_connections("unix") if str(c.laddr).endswith(".sock")]
        return len(own) > 1
    return False


def recovers(run: Run, name: str, within_s: float = 400) -> bool:
    """Whether the site soon replies again."""
    now = run.last_round()
    return wait_for(lambda: run.takes_part(name, now), within_s)


def test_trainer_killed_over_a_task_is_started_again(federation: Deployment, run: Run) -> None:
    """As the kernel does when memory is short: the task is done by a new trainer, unnoticed."""
    trainer = trainer_of(federation, "amber")
    send(trainer, signal.SIGSTOP)  # so that a task is waiting when it dies
    now = run.last_round()
    assert wait_for(lambda: bool(waiting(federation, "amber")), 120)
    send(trainer, signal.SIGKILL)

    assert recovers(run, "amber"), run.records()[-1]
    assert run.failures("amber", now) == []
    assert "the resident trainer died on a message" in federation.sites["amber"].said()
    assert [p.pid for p in federation.processes(TRAINER, "amber")] != [trainer.pid]


def test_trainer_killed_again_and_again_fails_by_name(federation: Deployment, run: Run) -> None:
    """One that dies before it has a task is no loss: the ClientApp then trains itself."""
    trainer = trainer_of(federation, "amber")
    send(trainer, signal.SIGSTOP)
    now = run.last_round()
    assert wait_for(lambda: bool(waiting(federation, "amber")), 120)
    send(trainer, signal.SIGKILL)

    def killed_until_named() -> bool:
        for other in federation.processes(TRAINER, "amber"):
            if at_work(other):
                send(other, signal.SIGKILL)
        return bool(run.failures("amber", now))

    assert wait_for(killed_until_named, 240), run.records()[-1]
    assert fails(run, "amber", now, "its trainer died 2 times over a train message, out of memory")
    assert recovers(run, "amber")


def test_killed_client_app_is_named(federation: Deployment, run: Run) -> None:
    now = run.last_round()
    trainer = trainer_of(federation, "amber")
    send(trainer, signal.SIGSTOP)
    assert wait_for(lambda: bool(waiting(federation, "amber")), 120)
    for client_app in waiting(federation, "amber"):
        send(client_app, signal.SIGKILL)
    send(trainer, signal.SIGCONT)

    why = "its ClientApp was killed or crashed"  # Flower notices within a minute
    assert fails(run, "amber", now, why), run.records()[-1]
    assert recovers(run, "amber")


def test_hung_trainer_is_ended_by_the_site_itself(federation: Deployment, run: Run) -> None:
    now = run.last_round()
    trainer = trainer_of(federation, "amber")
    send(trainer, signal.SIGSTOP)

    assert fails(run, "amber", now, f"no reply within {TIMEOUT_S} s"), run.records()[-1]
    assert recovers(run, "amber"), run.records()[-1]
    said = federation.sites["amber"].said()
    assert f"did not answer a train message within {TIMEOUT_S + 30} s and was ended" in said
    assert trainer.pid not in [p.pid for p in federation.processes(TRAINER, "amber")]


def test_data_that_change_during_a_run_are_refused(federation: Deployment, run: Run) -> None:
    data, now = federation.root / "cedar.jsonl", run.last_round()
    before = data.read_text()
    data.write_text(before + '{"instruction": "SECRET", "output": "SECRET"}\n')

    why = "its data file has changed since the run began; the site's log says more"
    assert fails(run, "cedar", now, why), run.records()[-1]
    data.write_text(before)
    assert recovers(run, "cedar")
    assert "SECRET" not in run.said()
    assert str(data) in (federation.root / "cedar/state/trainer.log").read_text()


def test_full_disk_of_a_site_is_named(federation: Deployment, run: Run) -> None:
    """Its state directory becomes a small file system, with what was in it, and fills up."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    state, now = federation.root / "cedar" / "state", run.last_round()
    disk = federation.root / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        kept = shutil.move(state, federation.root / "kept")
        shutil.copytree(kept, disk, dirs_exist_ok=True)
        state.symlink_to(disk)
        fill(disk / "filler")
        full = "its disk is full (No space left on device)"
        assert fails(run, "cedar", now, full), run.records()[-1]
        (disk / "filler").unlink()
        assert recovers(run, "cedar")
    finally:
        state.unlink()
        shutil.copytree(disk, state)
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_site_that_loses_power_comes_back(federation: Deployment, run: Run) -> None:
    """Flower refuses it while it counts as online; its start script tries until it may."""
    now = run.last_round()
    federation.kill_site("cedar")
    federation.start_site("cedar")

    assert wait_for(lambda: bool(run.failures("cedar", now)), 240), run.records()[-1]
    assert fails(run, "cedar", now, run.failures("cedar", now)[0])
    failed = run.last_round()
    assert wait_for(lambda: run.takes_part("cedar", failed), 300), run.failures("cedar", failed)


def test_every_round_was_written_down(run: Run) -> None:
    recorded = run.records()
    assert [record["round"] for record in recorded] == list(range(len(recorded)))
    for record in recorded[1:]:
        assert set(record["clients"]) | set(record["failures"]) == set(SITES)
