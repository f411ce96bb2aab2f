"""Append-only JSON lines on disk; records survive the end of the process."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from fedllm_flwr.errors import ConfigError, DataError, FederationError


class JsonLines:
    """The records of a file, and a way to add some; for one process at a time.

    A line that a power failure cut off at the end is dropped; anything else that is no JSON object
    is refused. Use it as a context manager.

    Raises:
        ConfigError: another process writes to it.
        DataError: a line is no record.
        FederationError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        self.records: list[dict[str, Any]] = []
        self._handle = -1

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"{self.path}: another process writes to it; wait for it, or give another --output."
            ) from None
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self.records = self._read()
        except OSError as error:
            self.__exit__(None, None, None)
            raise self._unusable(error) from error
        except DataError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self._lock.release()

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records at the end, and onto the disk before this returns."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        data = memoryview("".join(lines).encode("utf-8", "surrogatepass"))
        try:
            while data:
                data = data[os.write(self._handle, data) :]
            os.fsync(self._handle)
        except OSError as error:
            raise self._unusable(error) from error
        self.records += [dict(record) for record in records]

    def _read(self) -> list[dict[str, Any]]:
        text = self.path.read_bytes()
        whole, _, torn = text.rpartition(b"\n")
        if torn:
            os.ftruncate(self._handle, len(text) - len(torn))
        found = []
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                record = json.loads(line.decode("utf-8", "surrogatepass"))
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise DataError(
                    f"{self.path}, line {number}: no JSON object; delete the line, or the file."
                )
            found.append(record)
        return found

    def _unusable(self, error: OSError) -> FederationError:
        return FederationError(f"cannot write {self.path}: {error.strerror or error}.")
