"""Append-only file of JSON lines; records survive the process."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedllm_flwr.errors import ConfigError, DataError, FederationError


@dataclass(frozen=True)
class JsonLines:
    """An open file and its records."""

    file: FileIO
    records: list[dict[str, Any]]

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records, and flush them to disk before returning."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        data = memoryview("".join(lines).encode("utf-8", "surrogatepass"))
        while data:
            data = data[self.file.write(data) :]
        os.fsync(self.file.fileno())
        self.records.extend(dict(record) for record in records)


@contextlib.contextmanager
def json_lines(path: Path) -> Iterator[JsonLines]:
    """Open a file to read and append records, for one process at a time.

    An incomplete last line, left by a power failure, is dropped.

    Raises:
        ConfigError: another process has opened it.
        DataError: a line is not a JSON object.
        FederationError: the file cannot be read or written.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock, path.open("ab", buffering=0) as file:
            text = path.read_bytes()
            whole, _, torn = text.rpartition(b"\n")
            if torn:
                file.truncate(len(text) - len(torn))
            lines = whole.split(b"\n") if whole else []
            yield JsonLines(file, [_record(path, i, line) for i, line in enumerate(lines, 1)])
    except Timeout:
        raise ConfigError(
            f"{path} is in use by another process; wait for it, or give another --output."
        ) from None
    except OSError as error:
        raise FederationError(f"cannot write {path}: {error.strerror or error}.") from error


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8", "surrogatepass"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number}: not a JSON object; delete the line, or the file.")
    return record
