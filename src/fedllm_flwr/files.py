"""Atomic file writes: a file holds either its old or its new content."""

import os
import secrets
from pathlib import Path

from fedllm_flwr.errors import FederationError


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
