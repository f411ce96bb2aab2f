"""Clients on two CPU processes in whole runs, and processes that die, fail or stop."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from fedllm_flwr.client.local_round import train_locally
from fedllm_flwr.client.processes import processes
from fedllm_flwr.config import Config, changed
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.errors import FederationError, ModelError, RunInterrupted
from fedllm_flwr.federation.messages import Assignment, Update
from fedllm_flwr.models.adapted_model import load_model
from tiny_runs import ADAPTER, interrupting, outcome, resume, run_intercepted, run_tiny

pytestmark = pytest.mark.slow

TWO = "federation.client_processes=2"
ENDED_S = 30.0  # for a process that has been killed, or has lost its client, on a busy machine

Round = Callable[..., Update]


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    processes.end()


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended, but was not waited for, does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def others() -> list[int]:
    """The other processes of the client."""
    return [process.pid for process, _ in processes._others]


def ends(process: int) -> bool:
    deadline = time.monotonic() + ENDED_S
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not is_alive(process)


def test_a_run_on_two_processes_ends_near_that_of_one_and_resumes_to_its_bits(
    whole_run: Callable[..., Path], tmp_path: Path
) -> None:
    options = ("algorithm=scaffold", "lora.dropout=0", "training.optimizer=sgd")
    one = load_file(whole_run(*options) / ADAPTER)
    two = run_tiny(tmp_path / "two", TWO, *options)
    assert not others()
    for name, value in load_file(two.path / ADAPTER).items():
        np.testing.assert_allclose(value, one[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(RunInterrupted):
        run_intercepted(tmp_path / "stopped", interrupting(2, after=1), TWO, *options)
    assert outcome(resume(tmp_path / "stopped")) == outcome(two)


@pytest.fixture
def train(
    make_config: Callable[..., Config], random_examples: Callable[..., Any], tmp_path: Path
) -> Round:
    """One round of a client on two processes, from a configuration's sections."""
    examples = random_examples(50)

    def run(**sections: dict[str, Any]) -> Update:
        config = make_config(training={"max_steps": 2, "batch_size": 8, "max_length": 64})
        config = changed(config, federation={"client_processes": 2})
        for name, values in sections.items():
            config = changed(config, **{name: values})
        initial = load_model(config).initial
        assignment = Assignment(1, initial, 1e-2, config)
        return train_locally(assignment, ClientData("a", examples, examples), tmp_path)

    return run


def test_a_killed_process_is_one_error_and_the_next_round_starts_another(train: Round) -> None:
    first = train()
    [process] = others()
    os.kill(process, signal.SIGKILL)
    with pytest.raises(FederationError) as caught:
        train()
    assert str(caught.value) == (
        "federation.client_processes=2: one of the client's processes died (exit status -9), out "
        "of memory perhaps; lower training.micro_batch_size or federation.client_processes"
    )
    assert caught.value.shareable == str(caught.value)

    again = train()
    assert {n: v.tobytes() for n, v in again.delta.items()} == {
        n: v.tobytes() for n, v in first.delta.items()
    }
    # Within a round of minutes, which ends at once.
    [process] = others()
    killed = []

    def kill() -> None:
        os.kill(process, signal.SIGKILL)
        killed.append(time.monotonic())

    threading.Timer(3.0, kill).start()
    with pytest.raises(FederationError, match=r"died \(exit status -9\)"):
        train(training={"max_steps": 3000})
    assert time.monotonic() - killed[0] < ENDED_S
    assert ends(process)
    assert not others()


def test_a_process_that_is_late_is_one_error_and_ends() -> None:
    federation = {"client_processes": 2, "round_timeout_s": 0.2}
    with pytest.raises(FederationError) as caught:
        processes.start(changed(Config(), federation=federation))
    assert str(caught.value) == (
        "federation.client_processes=2: one of the client's processes was not ready within "
        "federation.round_timeout_s=0.2; raise it, or set federation.client_processes=1"
    )
    assert not others()
    assert not [child for child in psutil.Process().children() if "serve(" in child.cmdline()[-1]]


def test_an_error_of_one_process_is_the_error_of_the_round(train: Round, copied: Path) -> None:
    """The base model has gone before the other process loads it."""
    config = {"model": {"path": str(copied)}}
    train(**config)
    processes.end()
    (copied / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"its weights cannot be loaded"):
        train(**config)
    assert not others()


def test_a_process_ends_with_its_client() -> None:
    program = (
        "import time\n"
        "from fedllm_flwr.client.processes import processes\n"
        "from fedllm_flwr.config import Config, changed\n"
        "processes.start(changed(Config(), federation={'client_processes': 2}))\n"
        "print(processes._others[0][0].pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        process = int(client.stdout.readline())
        assert is_alive(process)
        client.kill()
    assert ends(process)
