"""Old runs leave a SuperLink's database of Flower's own tables; sites and newer runs stay."""

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedllm_flwr.commands import main as cli
from fedllm_flwr.deployment.retention import prune_runs
from fedllm_flwr.deployment.server_directory import init_server
from fedllm_flwr.errors import ConfigError, FederationError

NOW = datetime.now(UTC)
RUNS = {1: NOW - timedelta(days=100), 2: NOW - timedelta(days=10), 3: None}  # when they ended


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A server's directory with a database of Flower's tables: old, young and unfinished runs."""
    from flwr.supercore.state.schema.corestate_tables import create_corestate_metadata
    from flwr.supercore.state.schema.linkstate_tables import create_linkstate_metadata
    from flwr.supercore.state.schema.objectstore_tables import create_objectstore_metadata
    from sqlalchemy import create_engine, insert

    init_server(tmp_path / "server", ["localhost"], 9191, insecure=True)
    engine = create_engine(f"sqlite:///{tmp_path / 'server' / 'superlink.db'}")
    tables = {}
    for make in (create_corestate_metadata, create_linkstate_metadata, create_objectstore_metadata):
        metadata = make()
        metadata.create_all(engine)
        tables |= metadata.tables
    with engine.begin() as connection:

        def add(table: str, **values: object) -> None:
            connection.execute(insert(tables[table]).values(**values))

        add("node", node_id=7, status="online", public_key=b"key")
        for run, ended in RUNS.items():
            add("run", run_id=run, fab_hash=f"fab{run}", primary_task_id=10 + run)
            add("fab", fab_hash=f"fab{run}", content=b"x", verifications="")
            add(
                "task",
                task_id=10 + run,
                type="serverapp",
                run_id=run,
                pending_at=NOW,
                finished_at=ended,
            )
            add("task_logs", timestamp=1.0, task_id=10 + run, log="line")
            add("message_ins", message_id=f"in{run}", run_id=run, content=b"x")
            add("series_runs", series_id=run, run_id=run)
            add("series_context", series_id=run, context=b"x")
            if "object_push_sessions" in tables:  # Flower 1.42
                add(
                    "object_push_sessions",
                    session_id=f"s{run}",
                    run_id=run,
                    expires_at=NOW,
                    pending_count=1,
                )
                add("object_push_session_pending", session_id=f"s{run}", object_id=f"object{run}")
            add("objects", object_id=f"object{run}", content=b"x" * 100_000)
            add("run_objects", run_id=run, object_id=f"object{run}")
        add("objects", object_id="shared", content=b"x")
        for run in RUNS:
            add("run_objects", run_id=run, object_id="shared")
    engine.dispose()
    return tmp_path / "server"


def found(server: Path, statement: str) -> list[object]:
    with closing(sqlite3.connect(server / "superlink.db")) as database:
        return [row[0] for row in database.execute(statement)]


def test_runs_that_ended_long_ago_are_removed(server: Path) -> None:
    size = (server / "superlink.db").stat().st_size
    [line] = prune_runs(server, 30)

    assert line.startswith("Removed 1 runs that ended more than 30 days ago")
    tables = set(found(server, "SELECT name FROM sqlite_master WHERE type = 'table'"))
    for table in ("run", "task", "message_ins", "series_runs"):
        assert found(server, f"SELECT run_id FROM {table} ORDER BY run_id") == [2, 3]
    assert found(server, "SELECT series_id FROM series_context ORDER BY series_id") == [2, 3]
    if "object_push_sessions" in tables:
        left = "SELECT session_id FROM object_push_session_pending ORDER BY session_id"
        assert found(server, left) == ["s2", "s3"]
    assert found(server, "SELECT task_id FROM task_logs ORDER BY task_id") == [12, 13]
    assert found(server, "SELECT object_id FROM objects ORDER BY object_id") == [
        "object2",
        "object3",
        "shared",
    ]
    assert found(server, "SELECT fab_hash FROM fab ORDER BY fab_hash") == ["fab2", "fab3"]
    assert found(server, "SELECT node_id FROM node") == [7]
    assert (server / "superlink.db").stat().st_size < size - 90_000
    assert prune_runs(server, 30)[0].startswith("Removed 0 runs")


def test_run_that_goes_on_is_never_removed(server: Path) -> None:
    prune_runs(server, 1)
    assert found(server, "SELECT run_id FROM run") == [3]


def test_mistakes_are_named(server: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--days 0"):
        prune_runs(server, 0)
    assert cli.main(["server", "prune", str(tmp_path)]) == 2
    (server / "superlink.db").write_bytes(b"no database" * 1000)
    with pytest.raises(FederationError, match="old runs cannot be removed"):
        prune_runs(server, 30)
