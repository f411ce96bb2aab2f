"""Request ledger of a site: counts of each run's messages, and the answer to its query.

A run must keep the settings of its first message. Numbers that depend on the site's data are
disclosed once: a repeated query gets the same answer, and a different query gets none.
"""

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedllm_flwr.config import Config
from fedllm_flwr.deployment.audit import settings_digest
from fedllm_flwr.deployment.policy import Policy
from fedllm_flwr.errors import FederationError, RefusedError
from fedllm_flwr.federation.messages import ClientInfo
from fedllm_flwr.files import write_atomically

_DAY_S = 86_400


class Ledger:
    """The files ``<Flower's id of a run>.json`` and ``day.json`` of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def count(self, run_id: str, config: Config, policy: Policy, run: str = "") -> None:
        """Count a message of a run.

        Args:
            run_id: Flower's id of the run.
            config: as the server sent it.
            run: the server's own id of the run, under which the site keeps its state.

        Raises:
            RefusedError: the settings differ from the run's first message, or there are too many
                messages.
            FederationError: the folder cannot be written.
        """
        today = datetime.now(UTC).date().isoformat()
        with self._locked():
            if policy.state_days is not None:
                oldest = time.time() - policy.state_days * _DAY_S
                for file in self._folder.glob("*.json"):
                    if file.name != "day.json" and file.stat().st_mtime < oldest:
                        file.unlink(missing_ok=True)
            entry, day = self._read(run_id), self._read("day")
            digest = settings_digest(asdict(config))
            if entry.setdefault("settings", digest) != digest:
                raise RefusedError(
                    "the site refuses other settings than this run began with; start a new run"
                )
            messages = entry.get("messages", 0) + 1
            of_day = (day.get("messages", 0) if day.get("date") == today else 0) + 1
            for limit, count, whose in (
                ("max_messages_per_run", messages, "of this run"),
                ("max_messages_per_day", of_day, "of this day"),
            ):
                most: int | None = getattr(policy, limit)
                if most is not None and count > most:
                    raise RefusedError(
                        f"the site refuses message {count} {whose}: it is above its {limit} "
                        f"({most}); let its operator change this site's policy.yaml"
                    )
            if run and run not in entry.setdefault("runs", []):
                entry["runs"].append(run)
            self._write(run_id, {**entry, "messages": messages})
            self._write("day", {"date": today, "messages": of_day})

    def answer(self, run_id: str) -> ClientInfo | None:
        """The answer to the run's query; None before the query."""
        with self._locked():
            told = self._read(run_id).get("told")
        return None if told is None else ClientInfo(**told)

    def keep_answer(self, run_id: str, info: ClientInfo) -> None:
        """Keep the answer to the run's query."""
        with self._locked():
            self._write(run_id, {**self._read(run_id), "told": asdict(info)})

    def runs_of(self, run_id: str) -> list[str]:
        """The server's own ids of a run; empty before its first assignment."""
        runs: list[str] = self._read(run_id).get("runs", [])
        return runs

    def _file(self, name: str) -> Path:
        return self._folder / f"{quote(name, safe='').replace('.', '%2E')}.json"

    def _read(self, name: str) -> dict[str, Any]:
        file = self._file(name)
        try:
            entry: dict[str, Any] = json.loads(file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise FederationError(f"{file} cannot be read ({error}); remove it") from error
        return entry

    def _write(self, name: str, entry: dict[str, Any]) -> None:
        write_atomically(self._file(name), json.dumps(entry).encode())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = (self._folder / "lock").open("w")
        except OSError as error:
            raise FederationError(f"cannot write {self._folder}: {error.strerror}.") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
