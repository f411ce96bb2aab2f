"""No message of a server leads to a file of its choice at a site."""

from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import RecordDict

from fedllm_flwr.client.requests import answer
from fedllm_flwr.client.simulated import add_note
from fedllm_flwr.client.site import Site
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import FederationConfig
from fedllm_flwr.federation.wire import pack_query, unpack_failure

CONFIG = Config(federation=FederationConfig(engine="deployment", num_clients=1))


@pytest.mark.parametrize(
    "run", ["", ".", "..", "../..", "/etc", "a/../../b", "..\\..", "%2e%2e", "0123456789abcdef"]
)
def test_state_of_any_run_lies_below_the_state_folder(run: str, tmp_path: Path) -> None:
    site = Site({"client-name": "ward", "state-dir": str(tmp_path / "state")}, 1, 7)
    folder = site.memory_folder("ward", run, RecordDict())

    assert folder.resolve() == folder
    assert folder.parent.parent == tmp_path / "state" / "runs"


def test_states_of_two_runs_lie_apart(tmp_path: Path) -> None:
    site = Site({"client-name": "ward", "state-dir": str(tmp_path)}, 1, 7)
    names = ["run", ".", "..", "a", "A", "a.b", "a%2Eb"]
    assert len({site.memory_folder("ward", run, RecordDict()) for run in names}) == len(names)


def test_only_a_simulated_client_takes_its_state_folder_from_a_message(tmp_path: Path) -> None:
    """A note of the simulation in a server's message does not move the state of a site."""
    noted, own = tmp_path / "noted", tmp_path / "own"
    content = RecordDict()
    add_note(content, noted / "clients", 0)
    noted.mkdir()
    node = {"client-name": "ward", "state-dir": str(own)}

    assert Site(node, 1, 7).memory_folder("ward", "run", content) == own / "runs" / "run" / "ward"
    simulated = Site({**node, "partition-id": 0}, 1, 7)
    assert simulated.memory_folder("client-0", "run", content) == noted / "clients" / "client-0"


def test_simulated_client_of_another_machine_keeps_its_state_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker of a Ray cluster without a shared file system, which has no such run."""
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    content = RecordDict()
    add_note(content, tmp_path / "elsewhere" / "clients", 0)
    site = Site({"partition-id": 0}, 1, 7)

    folder = site.memory_folder("client-0", "run", content)
    assert folder == tmp_path / "state" / "runs" / "run" / "client-0"


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
