"""Atomic save and load of the whole server state: safetensors and JSON, never pickle."""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from fedllm_flwr.errors import FederationError
from fedllm_flwr.factors import folded, joined
from fedllm_flwr.federation.messages import FROZEN, Acknowledged
from fedllm_flwr.federation.tensor_files import load_params, save_params
from fedllm_flwr.params import Groups, Params

_TENSORS, _SENT = "state.", "sent."  # prefixes of groups in a file
FROZEN_GROUP = f"{_TENSORS}{FROZEN}"
"""The frozen factors in a file."""


@dataclass(frozen=True)
class ServerState:
    """Everything that the server needs to continue or resume a run.

    Args:
        round: number of completed rounds.
        params: the global adapter after these rounds.
        tensors: the algorithm's own tensors (float64), by symbol: a server optimizer's moments
            ``m`` and ``v``, SCAFFOLD's ``control``. ``frozen`` holds factors of any rank that
            clients apply in addition to the adapter and do not train, ``downlink`` and
            ``downlink.<round>`` what clients receive and its last changes (`federation.downlink`).
        sent: groups of tensors that the training task sends to clients in every round, such as the
            adapter of DPO's reference model.
        run: id of the run, which does not change when the run is resumed.
        clients: the updates that the server has accepted from every client of the run.
    """

    round: int
    params: Params
    tensors: Groups = field(default_factory=dict)
    sent: Groups = field(default_factory=dict)
    run: str = ""
    clients: dict[str, Acknowledged] = field(default_factory=dict)

    @property
    def adapter(self) -> Params:
        """The adapter to score and to export: ``params`` as plain products, and frozen factors."""
        return joined(folded(self.params), self.tensors.get(FROZEN, {}))


def save_state(directory: Path, state: ServerState, keep: int) -> Path:
    """Write the state of a finished round, then delete all but the newest `keep` states.

    Raises:
        FederationError: the file cannot be written; the states of earlier rounds are kept.
    """
    groups = {"params": state.params}
    groups |= {f"{_TENSORS}{name}": params for name, params in state.tensors.items()}
    groups |= {f"{_SENT}{name}": params for name, params in state.sent.items()}
    path = state_file(directory, state.round)
    metadata = {
        "round": str(state.round),
        "tensors": json.dumps([*state.tensors]),
        "sent": json.dumps([*state.sent]),
        "run": state.run,
        "clients": json.dumps({name: [c.round, c.updates] for name, c in state.clients.items()}),
    }
    save_params(path, groups, metadata)
    for old in _newest_first(directory)[keep:]:
        old.unlink(missing_ok=True)
    return path


def load_state(directory: Path) -> tuple[ServerState, list[str]]:
    """The newest readable state of a run, and a warning for each unreadable newer one.

    Removes unfinished files of a server that was killed while writing.

    Raises:
        FederationError: no checkpoint can be read.
    """
    for unfinished in directory.glob(".round-*.safetensors.*"):
        unfinished.unlink(missing_ok=True)
    warnings: list[str] = []
    for path in _newest_first(directory):
        try:
            return read_state(path), warnings
        except FederationError as error:
            warnings.append(f"{error} Falling back to the checkpoint before.")
    raise FederationError(f"{directory} holds no readable checkpoint; start a new run.")


def state_file(directory: Path, server_round: int) -> Path:
    """Path of the checkpoint after a round, which may not exist."""
    return directory / f"round-{server_round:05d}.safetensors"


def kept_rounds(directory: Path) -> list[int]:
    """Rounds that have a checkpoint, readable or not, newest first."""
    return [int(path.stem.partition("-")[2]) for path in _newest_first(directory)]


def newest_round(directory: Path) -> int | None:
    """Round of the newest checkpoint, readable or not; None if there is none."""
    return next(iter(kept_rounds(directory)), None)


def newest_readable(directory: Path) -> int | None:
    """Round of the newest readable checkpoint; None if there is none."""
    for path in _newest_first(directory):
        with contextlib.suppress(FederationError):
            return read_state(path).round
    return None


def read_state(path: Path) -> ServerState:
    """Read a state from a checkpoint file.

    Raises:
        FederationError: the file cannot be read or is not a checkpoint.
    """
    groups, metadata = load_params(path)
    try:
        names = json.loads(metadata["tensors"])
        tensors = {name: groups.get(f"{_TENSORS}{name}", {}) for name in names}  # may be empty
        sent = {name: groups[f"{_SENT}{name}"] for name in json.loads(metadata["sent"])}
        clients = {
            name: Acknowledged(int(server_round), int(updates))
            for name, (server_round, updates) in json.loads(metadata["clients"]).items()
        }
        return ServerState(
            round=int(metadata["round"]),
            params=groups["params"],
            tensors=tensors,
            sent=sent,
            run=metadata["run"],
            clients=clients,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise FederationError(f"{path} is not a checkpoint of a run (no {error}).") from error


def _newest_first(directory: Path) -> list[Path]:
    found = {path.stem.partition("-")[2]: path for path in directory.glob("round-*.safetensors")}
    numbers = sorted((number for number in found if number.isdigit()), key=int, reverse=True)
    return [found[number] for number in numbers]
