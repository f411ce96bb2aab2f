"""``fedllm run`` as users start it: on Ray, interrupted, killed, and gone on with."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm_flwr.federation.state import newest_round
from processes import (
    interrupt_group,
    interrupt_process,
    nothing_left,
    relatives,
    started,
    terminate_process,
    wait_for,
)
from tiny_runs import outcome, run_tiny, tiny

PATIENCE_S = 240.0  # on a busy machine
ENDLESS = ("federation.num_rounds=500", "evaluation.every=0", "training.max_steps=4")


@pytest.mark.slow
def test_ray_run(tmp_path: Path) -> None:
    """The default engine: status 0, silent stderr, no process left, the bits of in-process."""
    with started(["fedllm", "run", *tiny("output_dir=run")], tmp_path) as process:
        shown, errors = process.communicate(timeout=PATIENCE_S)
        assert errors == ""
        assert process.returncode == 0
        assert nothing_left(tmp_path) == []
    assert "Finished in" in shown
    assert outcome(tmp_path / "run") == outcome(run_tiny(tmp_path / "inprocess"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        ["algorithm=flora", "lora.ranks=[*1:4,*2:2]"],
        ["algorithm=fed_sb", "federation.num_rounds=4"],
        ["algorithm=ditto"],
        ["algorithm=scaffold", "communication.downlink=int4", "federation.num_rounds=4"],
    ],
    ids=lambda rule: rule[0],
)
def test_rules_about_factors_on_ray(rule: list[str], tmp_path: Path) -> None:
    """Other ranks, frozen factors, cores, adapters of the clients' own: the bits of in-process."""
    with started(["fedllm", "run", *tiny("output_dir=run", *rule)], tmp_path) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, errors) == (0, "")
    assert outcome(tmp_path / "run") == outcome(run_tiny(tmp_path / "inprocess", *rule))


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [interrupt_process, interrupt_group, terminate_process])
@pytest.mark.parametrize("engine", ["ray", "inprocess"])
def test_ctrl_c(
    engine: str, interrupt: Callable[[subprocess.Popen[str]], None], tmp_path: Path
) -> None:
    overrides = tiny(f"federation.engine={engine}", "output_dir=run", *ENDLESS)
    with started(["fedllm", "run", *overrides], tmp_path) as process:
        assert wait_for(lambda: (newest_round(tmp_path / "run/checkpoints") or 0) >= 2, PATIENCE_S)
        pressed = time.monotonic()
        interrupt(process)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert time.monotonic() - pressed < 15
        assert process.returncode == 130
        assert nothing_left(tmp_path) == []
    last = newest_round(tmp_path / "run/checkpoints")
    assert errors == (
        f"error: interrupted; round {last} is saved; resume with: fedllm run resume=run\n"
    )
    again = ["fedllm", "run", "resume=run", f"federation.num_rounds={(last or 0) + 1}"]
    with started(again, tmp_path) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, errors) == (0, "")
    assert newest_round(tmp_path / "run/checkpoints") == (last or 0) + 1


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.5, 3.0, 6.0])
def test_ctrl_c_while_starting(delay_s: float, tmp_path: Path) -> None:
    with started(["fedllm", "run", *tiny("output_dir=run", *ENDLESS)], tmp_path) as process:
        time.sleep(delay_s)
        interrupt_group(process)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode in (130, -signal.SIGINT)  # by Python itself, before main
        assert nothing_left(tmp_path) == []
    if process.returncode == 130:
        assert errors.startswith("error: interrupted")
        assert len(errors.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_killed_run_ends_as_the_uninterrupted_one(algorithm: str, tmp_path: Path) -> None:
    chosen = (f"algorithm={algorithm}", "federation.num_rounds=8", "training.max_steps=20")
    with started(["fedllm", "run", *tiny("output_dir=run", *chosen)], tmp_path) as process:
        checkpoints = tmp_path / "run/checkpoints"
        assert wait_for(lambda: (newest_round(checkpoints) or 0) >= 2, PATIENCE_S)
        time.sleep(0.3)  # into the next round
        process.kill()
        process.communicate()
        left = nothing_left(tmp_path, within_s=20)  # Ray notices that its driver is gone
        assert left == []
    last = newest_round(checkpoints)
    assert 2 <= (last or 0) < 8
    with started(["fedllm", "run", "resume=run"], tmp_path) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, errors) == (0, "")
    assert outcome(tmp_path / "run") == outcome(run_tiny(tmp_path / "whole", *chosen))


@pytest.mark.slow
def test_worker_that_dies_is_reported(tmp_path: Path) -> None:
    """A client's process killed from outside (out of memory): the run ends, and says so."""
    overrides = tiny("output_dir=run", *ENDLESS, "federation.round_timeout_s=60")
    with started(["fedllm", "run", *overrides], tmp_path) as process:
        assert wait_for(lambda: (newest_round(tmp_path / "run/checkpoints") or 0) >= 1, PATIENCE_S)
        workers = [each for each in relatives(tmp_path) if "ClientAppActor" in _name(each)]
        assert workers
        for worker in workers:
            worker.kill()
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
        assert nothing_left(tmp_path) == []
    assert errors.startswith("error: ")
    assert "resume=run" in errors
    assert len(errors.splitlines()) == 1


def _name(process: object) -> str:
    return " ".join(process.cmdline())  # type: ignore[attr-defined]
