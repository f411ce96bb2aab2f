"""A site's audit log: append-only JSON lines, chained by hashes.

Every line contains the SHA-256 of itself and of the previous line, also across files, so that
changed, removed or inserted lines are detected. ``head.json`` next to the files stores the hash of
the last line, so that lines missing at the end are detected as well. Anyone with write access to
the files can forge a whole new chain; to detect that, keep the last hash elsewhere.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedllm_flwr.errors import FederationError
from fedllm_flwr.files import write_atomically

Entry = dict[str, Any]

WAITING = "waiting"
_START = "0" * 64  # previous hash in the very first line
_LARGEST_FILE = 4 * 2**20  # bytes, after which the next file begins
_HEAD = "head.json"


@dataclass(frozen=True)
class AuditReport:
    """The entries of a log, oldest first, and the problems of its chain."""

    entries: list[Entry]
    problems: list[str] = field(default_factory=list)  # each names a file and a line
    removed: int = 0  # entries before the first existing one

    @property
    def head(self) -> str:
        """Hash of the newest entry."""
        return str(self.entries[-1]["hash"]) if self.entries else _START


class AuditLog:
    """The log in a directory, shared by the processes of a site."""

    def __init__(self, folder: Path, largest_file: int = _LARGEST_FILE) -> None:
        self.folder = folder
        self._largest_file = largest_file

    def append(self, entry: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> None:
        """Append an entry with a number, a time and its hashes.

        Repeated entries of a run that waits for approval are omitted.

        Args:
            settings: settings of ``entry["settings_digest"]``; written once per file.

        Raises:
            FederationError: the log cannot be written.
        """
        noted = dict(entry)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self.folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                files = self.files()
                file = files[-1] if files else None
                earlier = [] if file is None else _whole_lines(file)
                before = earlier or (_whole_lines(files[-2]) if len(files) > 1 else [])
                last = before[-1] if before else self._head()
                of_run = [known for known in earlier if known.get("run") == noted.get("run")]
                if noted.get("verdict") == WAITING and of_run:
                    keys = ("verdict", "settings_digest")
                    if all(of_run[-1].get(key) == noted.get(key) for key in keys):
                        return
                number = last["sequence"] + 1 if last else 1
                if file is None or file.stat().st_size > self._largest_file:
                    file, earlier = self.folder / f"audit-{number:09d}.jsonl", []
                digest = noted.get("settings_digest")
                if settings is not None and not any(
                    known.get("settings_digest") == digest and "settings" in known
                    for known in earlier
                ):
                    noted["settings"] = dict(settings)
                now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
                noted = {"sequence": number, "time": now, **noted}
                noted["previous"] = last["hash"] if last else _START
                noted["hash"] = _hash(noted)
                descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                with os.fdopen(descriptor, "ab") as stream:
                    stream.write(json.dumps(noted, ensure_ascii=False).encode() + b"\n")
                    stream.flush()
                    os.fsync(descriptor)
                head = {"sequence": number, "hash": noted["hash"]}
                write_atomically(self.folder / _HEAD, json.dumps(head).encode())
        except OSError as error:
            raise FederationError(
                f"cannot write the audit log in {self.folder}: {error.strerror or error}."
            ) from error

    def read(self) -> AuditReport:
        """All entries, and the result of checking the chain.

        Raises:
            FederationError: the files cannot be read.
        """
        entries: list[Entry] = []
        problems: list[str] = []
        number, link, removed = 0, _START, 0  # of the previous entry
        try:
            for file in self.files():
                for at, line in enumerate(file.read_bytes().split(b"\n"), 1):
                    if not line:
                        continue
                    where, entry = f"{file.name}, line {at}", _parsed(line)
                    if entry is None:
                        problems.append(f"{where}: not an entry of this log")
                        continue
                    if not entries and entry["sequence"] > 1:
                        removed = entry["sequence"] - 1
                    elif entry["sequence"] != number + 1:
                        problems.append(
                            f"{where}: entry {entry['sequence']} follows entry {number}; some were "
                            "removed or put in"
                        )
                    elif entry["previous"] != link:
                        problems.append(
                            f"{where}: the line before it was changed, or another stood there"
                        )
                    if entry["hash"] != _hash(entry):
                        problems.append(f"{where}: it was changed after it was written")
                    entries.append(entry)
                    number, link = entry["sequence"], entry["hash"]
            head = self._head()
        except OSError as error:
            raise FederationError(
                f"{self.folder}: the audit log cannot be read ({error.strerror or error}); run "
                "this as the user that the site runs as"
            ) from error
        if head is None and entries:
            problems.append(f"{_HEAD} is missing or changed")
        elif head is not None and head["sequence"] > number:
            problems.append(f"entries {number + 1} to {head['sequence']} are missing at the end")
        return AuditReport(entries, problems, removed)

    def files(self) -> list[Path]:
        """The log's files, oldest first."""
        return sorted(self.folder.glob("audit-*.jsonl"))

    def _head(self) -> Entry | None:
        """Number and hash of the last entry in ``head.json``; None if that is missing."""
        try:
            head = json.loads((self.folder / _HEAD).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        keys = {"sequence": int, "hash": str}
        is_head = isinstance(head, dict) and all(type(head.get(k)) is v for k, v in keys.items())
        return head if is_head else None


def settings_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of a run's resolved settings, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _hash(entry: Entry) -> str:
    """Hash of an entry without its own hash, but with the hash of the previous line."""
    content = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _whole_lines(file: Path) -> list[Entry]:
    """The entries of a file; an incomplete last line, as after a power failure, is removed.

    Raises:
        FederationError: a line is not an entry.
    """
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(file, len(whole))
    entries = [_parsed(line) for line in whole.splitlines()]
    if None in entries:
        raise FederationError(
            f"{file}, line {entries.index(None) + 1}: not an entry of the audit log; move the "
            "files aside to begin a new one."
        )
    return [entry for entry in entries if entry is not None]


def _parsed(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    keys = {"sequence": int, "time": str, "previous": str, "hash": str}
    if not isinstance(entry, dict):
        return None
    is_entry = all(type(entry.get(key)) is kind for key, kind in keys.items())
    return entry if is_entry else None
