"""On-disk cache of scored examples, by model and task.

The key of an entry covers everything that determines it: the base model's weights, the adapter's
file, the task's definition and data, the prompt, and the versions of the code.
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

_HASHED_WHOLE = 64 * 2**20  # bytes; of larger files, the size and both ends are hashed
_END = 2**20
_PACKAGE = Path(__file__).parents[2]


def default_cache() -> Path:
    """The default directory of the cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fedllm-flwr" / "evaluation"


class SamplesCache:
    """Entries in a directory, one file each; None disables the cache."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def get(self, key: str) -> Samples | None:
        """The cached samples; None if there are none or they cannot be read."""
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
    """A key that depends on every one of its parts."""
    text = json.dumps({**parts, "version": __version__}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def task_identity(task: SuiteTask, options: RunOptions) -> dict[str, Any]:
    """Everything that determines a task's questions: its definition, options and local data."""
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
        "subset": options.subset,
        "shots": options.shots,
        "seed": options.seed,
        "options": {"code": options.code, "open_ended": options.judging}.get(task.runner),
    }


@cache
def code_identity(package: Path = _PACKAGE) -> str:
    """A hash of the code that reads data, renders and tokenises prompts, and scores answers.

    Templates, tokenisation and choices are in ``data``; log-probabilities, generation and the model
    are in ``models``.
    """
    parts = ("data", "models", "evaluation")
    return files_identity(file for part in parts for file in sorted((package / part).rglob("*.py")))


def files_identity(paths: Iterable[Path]) -> str:
    """A hash of names and contents of files; of large files, of the size and both ends."""
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
