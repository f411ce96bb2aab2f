"""Atomic save and load of the whole server state: safetensors and JSON, never pickle."""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedllm_flwr.errors import FederationError
from fedllm_flwr.messages import Acknowledged
from fedllm_flwr.params import Array, Params

_FORMAT = "2"
_DIGEST = "sha256"


@dataclass(frozen=True)
class ServerState:
    """Everything that a server needs to go on: the adapter after ``round`` rounds and the rest.

    ``moments`` holds the server optimizer's tensors by name (``m``, ``v``), ``control`` SCAFFOLD's
    server variate c, ``reference`` the adapter of DPO's reference model, if it has one. ``clients``
    says of every client of the run what the server has accepted of it. ``run`` tells this run from
    others, also when it goes on after a stop.
    """

    round: int
    params: Params
    moments: dict[str, Params] = field(default_factory=dict)
    control: Params | None = None
    reference: Params | None = None
    run: str = ""
    clients: dict[str, Acknowledged] = field(default_factory=dict)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old or its new content, whatever happens.

    Raises:
        FederationError: the file system refuses (full, read-only, missing).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not mkstemp, whose files nobody else may read, whatever the umask says.
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise FederationError(f"cannot write {path}: {error.strerror or error}.") from error


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power failure, where the system can."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_params(path: Path, groups: Mapping[str, Params], metadata: Mapping[str, str]) -> None:
    """Write groups of tensors to one safetensors file, each name prefixed by its group.

    The file holds a digest of its content, by which `load_params` notices a flipped bit.
    """
    tensors = {
        f"{group}/{name}": np.asarray(value, order="C")
        for group, params in groups.items()
        for name, value in params.items()
    }
    known = {**metadata, "format": _FORMAT}
    known[_DIGEST] = _digest(tensors, known)
    write_atomically(path, save(tensors, metadata=known))


def _digest(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    """SHA-256 over metadata, names, dtypes, shapes and values."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\0{name}\0{value.dtype.str}\0{value.shape}\0".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def load_params(path: Path) -> tuple[dict[str, Params], dict[str, str]]:
    """Groups of tensors and metadata that `save_params` wrote.

    Raises:
        FederationError: the file is missing, truncated, of another format, or no longer what was
            written.
    """
    tensors: dict[str, Array] = {}
    try:
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensors[key] = file.get_tensor(key)
    except (OSError, SafetensorError, ValueError) as error:
        raise FederationError(f"cannot read {path}: {error}.") from error
    if metadata.get("format") != _FORMAT:
        raise FederationError(f"{path} is no checkpoint of this version.")
    written = metadata.pop(_DIGEST, "")
    if _digest(tensors, metadata) != written:
        raise FederationError(
            f"{path} is damaged: its content has changed since it was written (its SHA-256 "
            "differs); look at the disk."
        )
    groups: dict[str, Params] = {}
    for key, value in tensors.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = value
    return groups, metadata


def save_state(directory: Path, state: ServerState, keep: int) -> Path:
    """Write the state of a finished round, then delete all but the newest `keep`.

    Raises:
        FederationError: the file system refuses; the states of earlier rounds are still there.
    """
    groups = {"params": state.params}
    groups |= {f"moment.{name}": params for name, params in state.moments.items()}
    if state.control is not None:
        groups["control"] = state.control
    if state.reference is not None:
        groups["reference"] = state.reference
    path = state_file(directory, state.round)
    metadata = {
        "round": str(state.round),
        "moments": json.dumps([*state.moments]),
        "run": state.run,
        "clients": json.dumps({name: [c.round, c.updates] for name, c in state.clients.items()}),
    }
    save_params(path, groups, metadata)
    for old in _newest_first(directory)[keep:]:
        old.unlink(missing_ok=True)
    return path


def load_state(directory: Path) -> tuple[ServerState, list[str]]:
    """The newest readable state of a run, and a warning for each unreadable newer one.

    What a killed server was writing is removed.

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
    raise FederationError(f"{directory} holds no readable checkpoint; start the run anew.")


def state_file(directory: Path, server_round: int) -> Path:
    """Where the state after a round lies, if it is kept."""
    return directory / f"round-{server_round:05d}.safetensors"


def kept_rounds(directory: Path) -> list[int]:
    """Rounds whose states are there, readable or not, the newest first."""
    return [int(path.stem.partition("-")[2]) for path in _newest_first(directory)]


def newest_round(directory: Path) -> int | None:
    """Round of the newest checkpoint, readable or not; None without any."""
    return next(iter(kept_rounds(directory)), None)


def newest_readable(directory: Path) -> int | None:
    """Round of the newest checkpoint that can be read; None without any."""
    for path in _newest_first(directory):
        with contextlib.suppress(FederationError):
            return read_state(path).round
    return None


def read_state(path: Path) -> ServerState:
    """The state in a file.

    Raises:
        FederationError: it cannot be read, or holds something else.
    """
    groups, metadata = load_params(path)
    try:
        moments = {name: groups[f"moment.{name}"] for name in json.loads(metadata["moments"])}
        clients = {
            name: Acknowledged(int(server_round), int(updates))
            for name, (server_round, updates) in json.loads(metadata["clients"]).items()
        }
        return ServerState(
            round=int(metadata["round"]),
            params=groups["params"],
            moments=moments,
            control=groups.get("control"),
            reference=groups.get("reference"),
            run=metadata["run"],
            clients=clients,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise FederationError(f"{path} is no state of a run (no {error}).") from error


def _newest_first(directory: Path) -> list[Path]:
    found = {path.stem.partition("-")[2]: path for path in directory.glob("round-*.safetensors")}
    numbers = sorted((number for number in found if number.isdigit()), key=int, reverse=True)
    return [found[number] for number in numbers]
