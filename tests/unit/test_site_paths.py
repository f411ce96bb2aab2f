"""No message of a server leads to a file of its choice at a site."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedllm_flwr.client.requests import Site, answer, state_folder
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import FederationConfig
from fedllm_flwr.federation.wire import pack_query, unpack_failure

CONFIG = Config(federation=FederationConfig(engine="deployment", num_clients=1))


@pytest.mark.parametrize(
    "run", ["", ".", "..", "../..", "/etc", "a/../../b", "..\\..", "%2e%2e", "0123456789abcdef"]
)
def test_state_of_any_run_lies_below_the_state_folder(run: str, tmp_path: Path) -> None:
    site = Site({"client-name": "ward", "state-dir": str(tmp_path / "state")}, 1, 7)
    folder = state_folder(site, "ward", run)

    assert folder.resolve() == folder
    assert folder.parent.parent == tmp_path / "state" / "runs"


def test_states_of_two_runs_lie_apart(tmp_path: Path) -> None:
    site = Site({"client-name": "ward", "state-dir": str(tmp_path)}, 1, 7)
    names = ["run", ".", "..", "a", "A", "a.b", "a%2Eb"]
    assert len({state_folder(site, "ward", run) for run in names}) == len(names)


@pytest.mark.parametrize("path", ["/etc/model", "./model", "~/model", "models/mine"])
def test_model_of_a_server_is_no_local_path(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    asked = replace(CONFIG, model=replace(CONFIG.model, path=path))
    data = tmp_path / "notes.jsonl"
    data.write_text('{"instruction": "Why?", "output": "Because."}\n')
    node = {"client-name": "ward", "data-path": str(data), "state-dir": str(tmp_path / "state")}
    site = Site(node, 1, 7)

    failure = unpack_failure(answer("query", pack_query(asked), site))
    assert failure is not None
    assert failure.reason.startswith(f"model.path={path} is no hub id")
