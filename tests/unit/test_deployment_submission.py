"""`fedllm server run`: what it refuses before a SuperLink is asked, and how overrides travel."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr import cli
from fedllm_flwr.config.overrides import split_overrides
from fedllm_flwr.deployment import submission
from fedllm_flwr.deployment.server import init_server
from fedllm_flwr.deployment.submission import joined, run_on_server
from fedllm_flwr.errors import FederationError


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
    server: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], fraction: list[str]
) -> None:
    submitted: list[str] = []
    monkeypatch.setattr(submission, "_check", lambda folder, asked: None)
    monkeypatch.setattr(submission, "_submit", lambda folder, asked: submitted.extend(asked) or "1")
    monkeypatch.setattr(submission, "_follow", lambda folder, run_id: 0)
    assert run_on_server(server, overrides) == 0
    assert [text for text in submitted if "sample_fraction" in text] == fraction
    assert "federation.engine=deployment" in submitted


def test_directory_of_no_server_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["server", "run", str(tmp_path)]) == 2
    assert f"{tmp_path}: no directory that `fedllm server init` has made" in capsys.readouterr().err


@pytest.mark.slow  # two starts of Flower's command
def test_server_that_is_not_running_costs_one_line(server: Path) -> None:
    with pytest.raises(FederationError, match=r"does not answer; start .*start\.sh first"):
        run_on_server(server, ["federation.num_clients=2"])
