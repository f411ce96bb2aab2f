"""Atomic file writes: a file holds either its old or its new content."""

import os
import secrets
from pathlib import Path

from fedllm_flwr.errors import FederationError


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` atomically: `path` always contains either its old or its new content.

    Raises:
        FederationError: the file cannot be written (disk full, read-only, missing folder).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not mkstemp, which ignores the umask: nobody else could read its files.
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
    """Make a rename durable across a power failure, if the system supports it."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
