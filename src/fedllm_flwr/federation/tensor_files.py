"""Named groups of tensors in one safetensors file, with a digest of its content; never pickle."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedllm_flwr.errors import FederationError
from fedllm_flwr.files import write_atomically
from fedllm_flwr.params import Array, Params

_FORMAT = "3"
_DIGEST = "sha256"


def save_params(path: Path, groups: Mapping[str, Params], metadata: Mapping[str, str]) -> None:
    """Write groups of tensors to one safetensors file, each name prefixed by its group.

    The file contains a digest of its content, with which `load_params` detects corruption.
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
    """Read the groups of tensors and the metadata that `save_params` wrote.

    Raises:
        FederationError: the file is missing, truncated, damaged, or of another format.
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
        raise FederationError(f"{path} is not a checkpoint of this version.")
    written = metadata.pop(_DIGEST, "")
    if _digest(tensors, metadata) != written:
        raise FederationError(
            f"{path} is damaged: its content has changed since it was written (its SHA-256 "
            "differs); check the disk."
        )
    groups: dict[str, Params] = {}
    for key, value in tensors.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = value
    return groups, metadata
