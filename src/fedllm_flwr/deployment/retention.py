"""Removes old runs from a SuperLink's database; Flower keeps them forever."""

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedllm_flwr.deployment.flower import server_folder
from fedllm_flwr.errors import ConfigError, FederationError
from fedllm_flwr.reporting.text import format_bytes

_LOCK_TIMEOUT_S = 30.0
_TABLES_BY_RUN = (  # in an order that foreign keys allow; not every version has all of them
    *("logs", "context", "message_ins", "message_res", "run_objects", "task_event"),
    *("task_message", "task_usage", "run_connector", "series_runs", "object_push_sessions"),
)
_PUSHED = ("object_push_session_roots", "object_push_session_pending")  # by session
_ORPHANS = (
    "DELETE FROM object_children WHERE parent_id IN (SELECT object_id FROM old_objects)",
    "DELETE FROM objects WHERE object_id IN (SELECT object_id FROM old_objects)"
    " AND object_id NOT IN (SELECT object_id FROM run_objects)",
    "DELETE FROM series_context WHERE series_id NOT IN (SELECT series_id FROM series_runs)",
    "DELETE FROM fab WHERE fab_hash NOT IN (SELECT fab_hash FROM run WHERE fab_hash IS NOT NULL)",
)


def prune_runs(directory: str | Path, days: int) -> list[str]:
    """Remove runs that ended more than `days` days ago from ``superlink.db``, with their messages.

    Registered sites, active runs, and results in ``outputs/`` are kept.

    Returns:
        Lines for the operator.

    Raises:
        ConfigError: it is not a server directory, or `days` is below 1.
        FederationError: the database stays locked, or belongs to another version of Flower.
    """
    if days < 1:
        raise ConfigError(f"--days {days}: give 1 or more")
    file = server_folder(directory) / "superlink.db"
    if not file.is_file():
        return [f"{file}: not there yet, nothing to forget."]
    before = file.stat().st_size
    try:
        with closing(sqlite3.connect(file, _LOCK_TIMEOUT_S)) as database:
            with database:  # one transaction
                old = _remove_ended_before(database, datetime.now(UTC) - timedelta(days=days))
            if old:
                database.execute("VACUUM")
    except sqlite3.Error as error:
        raise FederationError(
            f"{file}: old runs cannot be removed ({error}); try again when no run is active"
        ) from error
    saved = format_bytes(max(0, before - file.stat().st_size))
    return [f"Removed {old} runs that ended more than {days} days ago ({saved})."]


def _remove_ended_before(database: sqlite3.Connection, moment: datetime) -> int:
    """Remove runs whose tasks have all ended before `moment`; return their number."""
    newest: dict[int, datetime] = {}  # end of each run's last task
    for run, finished in database.execute("SELECT run_id, finished_at FROM task"):
        ended = datetime.fromisoformat(finished) if finished else datetime.max.replace(tzinfo=UTC)
        ended = ended if ended.tzinfo else ended.replace(tzinfo=UTC)
        newest[run] = max(ended, newest.get(run, ended))
    old = [(run,) for run, ended in newest.items() if ended < moment]
    database.execute("CREATE TEMP TABLE old_runs (run_id INTEGER PRIMARY KEY)")
    database.executemany("INSERT INTO old_runs VALUES (?)", old)
    among = "run_id IN (SELECT run_id FROM old_runs)"
    database.execute(
        f"CREATE TEMP TABLE old_objects AS SELECT object_id FROM run_objects WHERE {among}"
    )
    database.execute(
        f"DELETE FROM task_logs WHERE task_id IN (SELECT task_id FROM task WHERE {among})"
    )
    there = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    for table in there.intersection(_PUSHED):
        sessions = f"SELECT session_id FROM object_push_sessions WHERE {among}"
        database.execute(f"DELETE FROM {table} WHERE session_id IN ({sessions})")
    for table in (*(name for name in _TABLES_BY_RUN if name in there), "run", "task"):
        database.execute(f"DELETE FROM {table} WHERE {among}")
    for statement in _ORPHANS:
        database.execute(statement)
    return len(old)
