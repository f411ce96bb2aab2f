"""On-disk cache for data files: digests of their content, and facts about their records."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedllm_flwr.errors import FederationError
from fedllm_flwr.files import write_atomically

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]
Stamps = list[tuple[Path, int, int]]

_SETTLED_S = 2.0  # age of the last change after which any further change alters the file's time


def cache_dir() -> Path:
    """Directory of cached data: $FEDLLM_CACHE, otherwise the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "fedllm-flwr"
    return Path(os.environ.get("FEDLLM_CACHE", default)).expanduser()


def stamps(path: Path) -> Stamps:
    """Path, size and modification time (ns) of a file, or of all files below a directory."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def path_digest(path: Path, folder: Path | None = None) -> str:
    """SHA-256 over the names and contents of a file, or of all files below a directory.

    A file whose size and modification time have not changed is not read again.

    Args:
        folder: folder that keeps digests between processes; None: they are not kept.

    Returns:
        The digest in hexadecimal; "" if there is no file.
    """
    digests = [f"{file.name} {_file_digest(file, *stamp, folder)}" for file, *stamp in stamps(path)]
    return sha256("\n".join(digests).encode()).hexdigest() if digests else ""


def code_digest(function: Callable[..., Any]) -> str:
    """Digest of the module that defines a function, which changes whenever the code changes."""
    return path_digest(Path(str(sys.modules[function.__module__].__file__)))


@lru_cache(maxsize=1024)
def _file_digest(file: Path, size: int, modified_ns: int, folder: Path | None) -> str:
    place = str(file.resolve())
    stamp = [place, size, modified_ns]
    note = (folder or Path()) / f"{sha256(place.encode()).hexdigest()}.json"
    with suppress(OSError, ValueError, KeyError):
        known = json.loads(note.read_bytes()) if folder else {}
        if known["stamp"] == stamp:
            return str(known["sha256"])
    with file.open("rb") as stream:
        digest = file_digest(stream, "sha256").hexdigest()
    if folder and time.time() - modified_ns / 1e9 > _SETTLED_S:
        with suppress(FederationError):
            write_atomically(note, json.dumps({"stamp": stamp, "sha256": digest}).encode())
    return digest


def remembered(
    what: Sequence[object], make: Callable[[], tuple[Arrays, Any]], folder: Path
) -> tuple[Arrays, Any]:
    """Arrays and a JSON value, read from `folder` if they were computed before.

    A broken file is recomputed, and an unwritable folder is ignored; both are logged.

    Args:
        what: name of the content; equal names mean equal contents.
    """
    path = folder / f"{sha256(repr(what).encode()).hexdigest()}.safetensors"
    if path.exists():
        try:
            arrays = load_file(path)
            return arrays, json.loads(arrays.pop("facts").tobytes())
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            logger.warning("%s is recomputed: %s", path, error)
    arrays, facts = make()
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    try:
        write_atomically(path, save({**arrays, "facts": text}))
    except FederationError as error:
        logger.warning("facts about the data are not cached: %s", error)
    return arrays, facts
