"""Cache of scored examples on disk, by model and questions.

An entry is found by all that decides on it: the base model's weights, the adapter's file, the
task's definition and data, the prompt and the versions of the programs.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from fedllm_flwr import __version__
from fedllm_flwr.evaluation.suites.catalogue import SuiteTask, suites_dir
from fedllm_flwr.evaluation.suites.options import RunOptions
from fedllm_flwr.evaluation.suites.samples import Samples
from fedllm_flwr.files import write_atomically

_HASHED_WHOLE = 64 * 2**20  # bytes; of larger files both ends and the size are hashed
_END = 2**20
_PACKAGE = Path(__file__).parents[2]


def default_cache() -> Path:
    """Default directory of the cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fedllm-flwr" / "evaluation"


class SamplesCache:
    """Entries in a directory, one file each; None keeps nothing."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def get(self, key: str) -> Samples | None:
        """Stored samples; None if there are none, or they cannot be read."""
        if self._directory is None:
            return None
        try:
            text = gzip.decompress(self._file(key).read_bytes())
            return Samples(**json.loads(text))
        except (OSError, ValueError, TypeError, EOFError):
            return None

    def put(self, key: str, samples: Samples) -> None:
        """Store an entry.

        Raises:
            FederationError: it cannot be written.
        """
        if self._directory is not None:
            text = json.dumps(asdict(samples)).encode()
            write_atomically(self._file(key), gzip.compress(text, compresslevel=3, mtime=0))

    def _file(self, key: str) -> Path:
        assert self._directory is not None
        return self._directory / key[:2] / f"{key}.json.gz"


def key_of(**parts: Any) -> str:
    """A key that differs as soon as one of its parts does."""
    text = json.dumps({**parts, "version": __version__}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def task_identity(task: SuiteTask, options: RunOptions) -> dict[str, Any]:
    """All that decides on the questions of a task: its definition, options and local data."""
    root = options.data_root
    data: list[Path] = []
    if root is not None:
        for name in task.files:
            data += sorted(root.glob(name.replace("{}", "*")))
    if task.runner == "open_ended" and options.judging.reference is not None:
        data.append(options.judging.reference)
    own = sorted((suites_dir() / task.suite).glob("*yaml"))
    return {
        "task": task,
        "files": files_identity(own if not task.folder else ()),
        "code": code_identity(),
        "data": files_identity(data),
        "limit": options.limit,
        "shots": options.shots,
        "seed": options.seed,
        "options": {"code": options.code, "open_ended": options.judging}.get(task.runner),
    }


@cache
def code_identity(package: Path = _PACKAGE) -> str:
    """A hash of what reads data, writes prompts, makes tokens of them, computes and scores answers.

    Templates, tokens and choices are in ``data``, log-probabilities, answers and the model itself
    in ``models``.
    """
    parts = ("data", "models", "evaluation")
    return files_identity(file for part in parts for file in sorted((package / part).rglob("*.py")))


def files_identity(paths: Iterable[Path]) -> str:
    """A hash of files' names and contents; of a large file's size and both its ends."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _HASHED_WHOLE:
                digest.update(file.read())
            else:
                digest.update(file.read(_END))
                file.seek(size - _END)
                digest.update(file.read())
    return digest.hexdigest()
