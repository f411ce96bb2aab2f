"""A digest of a model's directory: its weights, tokenizer and templates."""

import contextlib
import hashlib
import json
from pathlib import Path

from fedllm_flwr.errors import FederationError
from fedllm_flwr.files import write_atomically

_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".py")


def model_fingerprint(folder: Path, cache: Path) -> str:
    """``sha256:<64 digits>`` over the names and contents of a model's files.

    Args:
        cache: file that keeps the digests by size and modification time, since reading a large
            model takes minutes.

    Raises:
        FederationError: a file cannot be read.
    """
    known: dict[str, list[str | int]] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(cache.read_bytes())
    digests: dict[str, list[str | int]] = {}
    try:
        for file in sorted(folder.rglob("*")):
            if file.suffix not in _SUFFIXES or not file.is_file():
                continue
            name, status = file.relative_to(folder).as_posix(), file.stat()
            version: list[str | int] = [status.st_size, status.st_mtime_ns]
            digests[name] = known.get(name, [])
            if digests[name][:2] != version:
                with file.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                digests[name] = [*version, digest]
    except OSError as error:
        raise FederationError(f"cannot read the model in {folder}: {error.strerror}.") from error
    if digests != known:
        write_atomically(cache, json.dumps(digests).encode())
    lines = "".join(f"{name} {digest}\n" for name, (*_, digest) in digests.items())
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
