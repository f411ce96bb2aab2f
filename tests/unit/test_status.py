"""`fedllm status`: what it says of runs, servers and sites, and its exit status."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.supercore.grpc_health import run_health_server_grpc_no_tls

from fedllm_flwr.commands import main as cli
from fedllm_flwr.commands.status.command import NOT_WELL
from fedllm_flwr.commands.status.health import addresses, check_health
from fedllm_flwr.config.compose import compose, to_yaml
from fedllm_flwr.deployment.server_directory import init_server
from fedllm_flwr.deployment.site_directory import SiteOptions, init_site
from fedllm_flwr.errors import ConfigError, FederationError
from fedllm_flwr.federation.state import ServerState, save_state
from fedllm_flwr.runs import lock as liveness
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.lock import RoundBoard, held

RECORDS = [
    {"round": 0, "seconds": 0.0},
    {
        "round": 1,
        "loss": 1.402,
        "seconds": 9.7,
        "bytes_up": 200_000,
        "bytes_down": 300_000,
        "clients": {"a": {"loss": 1.5}, "b": {"loss": 1.3}},
        "failures": {"c": "no reply within 60 s"},
    },
]
HOLDING = """
import sys, time
from pathlib import Path
from fedllm_flwr.runs.lock import held
from fedllm_flwr.runs.directory import RunDirectory
with held(RunDirectory(Path(sys.argv[1])), *sys.argv[2:]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of two rounds that has finished one and saved it."""
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    config = compose(["federation.num_clients=null", "federation.num_rounds=2"])
    directory.config.write_text(to_yaml(config))
    directory.metrics.write_text("".join(json.dumps(item) + "\n" for item in RECORDS))
    save_state(directory.checkpoints, ServerState(1, {"w": np.zeros(2, np.float32)}), 2)
    return directory


def finish(run: RunDirectory) -> None:
    save_state(run.checkpoints, ServerState(2, {"w": np.zeros(2, np.float32)}), 2)
    run.adapter.mkdir()
    run.summary.write_text("{}")


def status(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["status", *arguments])
    return code, capsys.readouterr().out


def test_running(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    board = RoundBoard(run)
    with held(run):
        board.start_round(2, ["a", "b", "c"])
        board.reply(2, "a", 1.25)
        board.reply(2, "b", None)
        code, said = status(capsys, str(run.path))
        answer = json.loads(status(capsys, str(run.path), "--json")[1])

    assert code == 0
    host = socket.gethostname()
    assert f"running, 1 of 2 rounds of fedavg on demo (process {os.getpid()} on {host})" in said
    assert re.search(r"round 2     1 of 3 .* replied for [\d.]+ s, waiting for c\n", said), said
    assert "failed: b" in said
    assert "round 1     2/3 clients, loss 1.402, 9.7 s, 500 kB" in said
    assert "c: no reply within 60 s" in said
    assert "all rounds  9.7 s each, 500 kB, 1 reply missing or refused" in said
    assert answer["well"] is True
    assert answer["state"] == "running"
    assert answer["current"]["losses"] == {"a": 1.25}
    assert answer["last"]["failures"] == RECORDS[1]["failures"]


def test_killed_run_has_stopped(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    """The lock ends with the process, whatever it leaves on disk."""
    command = [sys.executable, "-c", HOLDING, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert status(capsys, str(run.path))[0] == 0
        who = f"process {process.pid} on .* is at this run"
        with pytest.raises(FederationError, match=who), held(run):
            pass
        process.send_signal(signal.SIGKILL)
    code, said = status(capsys, str(run.path))

    assert code == NOT_WELL
    assert "stopped, 1 of 2 rounds" in said
    assert f"round 1 is saved; resume with: fedllm run resume={run.path}" in said


@pytest.mark.parametrize("ended", [KeyboardInterrupt(), SystemExit(0)])
def test_ended_run_was_interrupted(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], ended: BaseException
) -> None:
    """By Ctrl-C, or by `flwr stop`, which makes the process exit."""
    with pytest.raises(type(ended)), held(run):
        raise ended
    code, said = status(capsys, str(run.path))

    assert code == NOT_WELL
    assert "on demo: interrupted\n" in said


def test_killed_deployment_names_the_servers_command(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    go_on = "fedllm server run /srv/fl-server"
    command = [sys.executable, "-c", HOLDING, str(run.path), go_on, "4711"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGKILL)
    code, said = status(capsys, str(run.path))

    assert code == NOT_WELL
    assert f"round 1 is saved; resume with: {go_on} resume={run.path}" in said


def test_failed_run_says_with_what(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FederationError), held(run):
        raise FederationError("round 2: 0 of 3 replies could be used")
    code, said = status(capsys, str(run.path))

    assert code == NOT_WELL
    assert "failed, 1 of 2 rounds of fedavg on demo: round 2: 0 of 3 replies" in said


def test_finished(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    with held(run):
        RoundBoard(run).start_round(2, ["a"])
        finish(run)
    code, said = status(capsys, str(run.path))

    assert (code, "finished" in said) == (0, True)
    assert not run.lock.exists()
    assert not run.current_round.exists()


def test_finished_run_that_is_extended_runs(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(run)
    with held(run):
        assert "running" in status(capsys, str(run.path))[1]


def test_a_disk_that_refuses_costs_the_file_alone(run: RunDirectory) -> None:
    run.current_round.mkdir()
    RoundBoard(run).start_round(1, ["a"])
    assert liveness.current_round(run) is None


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["."]])
def test_nothing_to_look_at(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["status", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def serving() -> Iterator[str]:
    """Address of a health server of Flower's own."""
    server: Any = run_health_server_grpc_no_tls("127.0.0.1:0")
    yield server.bound_address
    server.stop(None).wait()


def unused() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_health(serving: str, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = unused()
    code, said = status(capsys, "--health", serving)
    assert (code, said) == (0, f"  health      serving ({serving})\n")

    code, said = status(capsys, "--health", serving, "--health", nothing)
    assert code == NOT_WELL
    assert f"NOT serving: nothing answers there ({nothing})" in said


def test_health_of_what_never_answers_ends_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        health = check_health("x", f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3)
        assert time.monotonic() - started < 5
    assert health.problem == "no answer within 0.3 s"


@pytest.mark.parametrize("address", ["9094", "localhost:", "localhost:http", "localhost:70000"])
def test_health_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigError, match="give host:port"):
        check_health("x", address)


def test_directories_of_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their scripts start health servers on loopback, and status asks those."""
    init_server(tmp_path / "server", ["localhost"], 21_300)
    assert addresses(tmp_path / "server") == {
        "superlink": "127.0.0.1:21303",
        "superexec": "127.0.0.1:21304",
    }
    data = tmp_path / "notes.jsonl"
    data.write_text('{"instruction": "Why?", "output": "Because."}\n')
    for name, port in (("a", 21_310), ("b", None)):
        init_site(
            tmp_path / name,
            SiteOptions(name, str(data), "localhost:1", insecure=True, health_port=port),
        )
    assert addresses(tmp_path / "a") == {"supernode": "127.0.0.1:21310"}
    assert addresses(tmp_path / "b")["supernode"].startswith("127.0.0.1:9")

    for folder in ("server", "a"):
        code, said = status(capsys, str(tmp_path / folder))
        assert code == NOT_WELL
        assert "NOT serving: nothing answers there" in said


def test_comparison(run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was said to hold no run."""
    root = tmp_path / "both"
    names = ["fedavg-seed0", "fedavg-seed1"]
    (root / "runs").mkdir(parents=True)
    (root / "compare.json").write_text(json.dumps({"runs": names}))
    run.path.rename(root / "runs" / names[0])
    begun = RunDirectory(root / "runs" / names[0])
    code, shown = status(capsys, str(root))
    assert code == NOT_WELL
    assert shown.splitlines() == [
        f"{root}: comparison, 0 of 2 runs finished, 1 stopped, 1 waiting",
        "  fedavg-seed0  stopped    round 1 of 2",
        "  fedavg-seed1  waiting",
        f"  resume with: fedllm compare resume={root}",
    ]
    with held(begun):
        code, shown = status(capsys, str(root), "--json")
        found = json.loads(shown)
        assert (code, found["well"], found["state"]) == (0, True, "running")
        assert found["runs"]["fedavg-seed0"]["round"] == 1
        assert found["runs"]["fedavg-seed1"] is None


def test_watch_looks_again_until_the_run_has_ended(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    with contextlib.ExitStack() as running:
        running.enter_context(held(run))

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                finish(run)
                running.close()

        # Not time.sleep itself, which other threads of this process use.
        monkeypatch.setattr(
            "fedllm_flwr.commands.status.command.time", SimpleNamespace(sleep=pause)
        )
        code, shown = status(capsys, str(run.path), "--watch", "0.5")
    assert code == 0
    assert pauses == [0.5, 0.5]
    heads = [line.split(": ")[1] for line in shown.splitlines() if "of 2 rounds" in line]
    states = [head.split(",")[0] for head in heads]
    assert states == ["running", "running", "finished"]
    assert cli.main(["status", str(run.path), "--watch", "0"]) == 2
