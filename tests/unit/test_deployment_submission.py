"""`fedllm server run`: what it refuses before a SuperLink is asked, and how overrides travel."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.commands import main as cli
from fedllm_flwr.config.overrides import split_overrides
from fedllm_flwr.deployment.server_directory import init_server
from fedllm_flwr.deployment.submission import SubmittedRun, joined, on_the_sites, run_on_server
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.state import ServerState, save_state
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.lock import held

HOLDING = """
import sys, time
from pathlib import Path
from fedllm_flwr.runs.lock import held
from fedllm_flwr.runs.directory import RunDirectory
with held(RunDirectory(Path(sys.argv[1])), *sys.argv[2:]):
    print("held", flush=True)
    time.sleep(60)
"""


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1), max_size=4))
def test_overrides_come_apart_as_they_were(overrides: list[str]) -> None:
    assert split_overrides(joined(overrides)) == overrides


@pytest.fixture
def server(tmp_path: Path) -> Path:
    init_server(tmp_path / "server", ["localhost"], 9191, insecure=True)
    return tmp_path / "server"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("federation.num_round=3", "Did you mean 'federation.num_rounds'?"),
        ("resume=outputs/gone", "resume=outputs/gone"),
    ],
)
def test_mistake_is_refused_before_anything_is_submitted(
    server: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    assert cli.main(["server", "run", str(server), "federation.num_clients=2", override]) == 2

    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "fraction"),
    [
        ([], ["federation.sample_fraction=1"]),
        (["federation.num_rounds=3"], ["federation.sample_fraction=1"]),
        (["federation.sample_clients=2"], []),
        (["federation.sample_fraction=0.5"], ["federation.sample_fraction=0.5"]),
        (["resume=outputs/run"], []),
    ],
)
def test_all_sites_take_part_unless_the_run_says_otherwise(
    overrides: list[str], fraction: list[str]
) -> None:
    submitted = on_the_sites(overrides)
    assert [text for text in submitted if "sample_fraction" in text] == fraction
    assert "federation.engine=deployment" in submitted


@pytest.mark.parametrize("place", ["outputs/run", "elsewhere"])
def test_killed_app_is_noticed_by_its_lock(server: Path, place: str) -> None:
    """While it lives, and where another run holds the lock, nothing is said."""
    directory = RunDirectory(server / place)
    save_state(directory.checkpoints, ServerState(3, {"w": np.zeros(2, np.float32)}), 2)
    named = None if place.startswith("outputs") else place
    command = [sys.executable, "-c", HOLDING, str(directory.path), "fedllm server run x", "77"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        SubmittedRun(server, "77", named).check_not_killed()
        process.send_signal(signal.SIGKILL)
    SubmittedRun(server, "78", named).check_not_killed()
    with pytest.raises(FederationError) as error:
        SubmittedRun(server, "77", named).check_not_killed()
    assert str(error.value) == (
        f"run 77: the server's app (process {process.pid}) was killed or has crashed without a "
        "word, out of memory perhaps; round 3 is saved; resume with: fedllm server run "
        f"{server} resume={directory.path}"
    )


def test_app_that_ended_by_an_error_was_not_killed(server: Path) -> None:
    directory = RunDirectory(server / "outputs" / "run")
    directory.path.mkdir(parents=True)
    with pytest.raises(FederationError), held(directory, "fedllm server run x", "77"):
        raise FederationError("round 2: no replies")
    SubmittedRun(server, "77", None).check_not_killed()


def test_directory_of_no_server_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["server", "run", str(tmp_path)]) == 2
    assert f"{tmp_path}: no directory that `fedllm server init` has made" in capsys.readouterr().err


@pytest.mark.slow  # two starts of Flower's command
def test_server_that_is_not_running_costs_one_line(server: Path) -> None:
    with pytest.raises(FederationError, match=r"does not answer; start .*start\.sh first"):
        run_on_server(server, ["federation.num_clients=2"])
