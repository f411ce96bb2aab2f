"""What tells a model's directory from another: a digest of its weights, tokenizer and templates."""

import hashlib
import json
from pathlib import Path

from fedllm_flwr.errors import FederationError
from fedllm_flwr.files import write_atomically

_PARTS = (".json", ".safetensors", ".jinja", ".model", ".txt", ".py")


def model_fingerprint(folder: Path, known: Path | None = None) -> str:
    """``sha256:<64 digits>`` over the names and contents of a model's files.

    Args:
        known: a file that remembers digests of files by size and time of change, as a large
            model takes minutes to read; None: read everything.

    Raises:
        FederationError: a file cannot be read.
    """
    remembered = _remembered(known)
    digests: dict[str, list[str | int]] = {}
    try:
        for file in sorted(folder.rglob("*")):
            if file.suffix not in _PARTS or not file.is_file():
                continue
            name, status = file.relative_to(folder).as_posix(), file.stat()
            version: list[str | int] = [status.st_size, status.st_mtime_ns]
            before = remembered.get(name, [])
            digests[name] = before if before[:2] == version else [*version, _digest(file)]
    except OSError as error:
        raise FederationError(f"cannot read the model in {folder}: {error.strerror}.") from error
    if known is not None and digests != remembered:
        write_atomically(known, json.dumps(digests).encode())
    lines = "".join(f"{name} {digest}\n" for name, (*_, digest) in digests.items())
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remembered(known: Path | None) -> dict[str, list[str | int]]:
    if known is None:
        return {}
    try:
        digests: dict[str, list[str | int]] = json.loads(known.read_bytes())
    except (OSError, ValueError):
        return {}
    return digests
