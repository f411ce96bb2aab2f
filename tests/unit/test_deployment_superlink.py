"""The server's SuperLink waits for its database, and for who was there before, unlike Flower's."""

import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from flwr.app import ConfigRecord
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore import constant
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation import NoOpFederationManager

from fedllm_flwr.deployment.superlink import expect_back, take_pieces_twice
from fedllm_flwr.flower.names import is_http

STORING = """
import hashlib, sqlite3, sys, threading, time
from fedllm_flwr.deployment.superlink import wait_for_the_database
wait_for_the_database()
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
store = SqlObjectStore("superlink.db")
store.initialize()
other = sqlite3.connect("superlink.db", check_same_thread=False)
other.execute("BEGIN IMMEDIATE")
threading.Timer(6.5, other.rollback).start()
began = time.monotonic()
store.preregister(1, ObjectTree(object_id=hashlib.sha256(b"x").hexdigest()))
print(time.monotonic() - began)
"""


@pytest.mark.slow
def test_query_outlasts_a_lock_that_ends_flowers_own(tmp_path: Path) -> None:
    """Flower's own limit is 5 s."""
    done = subprocess.run(
        [sys.executable, "-c", STORING], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert 6 < float(done.stdout) < 30


@pytest.fixture
def state(tmp_path: Path) -> SqlLinkState:
    """A SuperLink's state, in a file as the server's is."""
    state = SqlLinkState(
        str(tmp_path / "superlink.db"), NoOpFederationManager(), InMemoryObjectStore()
    )
    state.initialize()
    return state


def last_heard_of(file: Path, seconds_ago: float) -> None:
    """Let the minute of every app and site have ended some time ago."""
    then = time.time() - seconds_ago
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE node SET online_until = ?", (then,))
        text = str(datetime.fromtimestamp(then, UTC))
        database.execute("UPDATE task SET active_until = ? WHERE token IS NOT NULL", (text,))


@pytest.mark.parametrize(("seconds_ago", "goes_on"), [(500, True), (1000, False)])
def test_who_was_there_is_expected_back_after_a_short_absence(
    seconds_ago: float, goes_on: bool, state: SqlLinkState, tmp_path: Path
) -> None:
    """Flower's own takes both for dead, and the run has failed."""
    node = state.create_node("", "", b"key", 30)
    state.activate_node(node, 30)
    kind = getattr(constant, "RunType", constant.TaskType).SERVER_APP
    run = state.create_run(None, None, "", {}, "@none/default", None, None, kind)
    task = state.get_run_info(run_ids=[run])[0].primary_task_id
    assert task is not None
    assert state.claim_task(task)
    assert state.activate_task(task)
    last_heard_of(tmp_path / "superlink.db", seconds_ago)

    expect_back(tmp_path / "superlink.db")
    assert state.get_nodes(run) == ({node} if goes_on else set())
    assert state.acknowledge_task_heartbeat(task) is goes_on
    assert state.get_run_status({run})[run].status == ("running" if goes_on else "finished")


@pytest.mark.skipif(not is_http(), reason="this Flower takes a piece twice by itself")
def test_a_piece_that_another_site_sends_too_is_taken(state: SqlLinkState) -> None:
    """From a site of Flower 1.31, which names no session, and from one whose answer was lost."""
    piece = ConfigRecord({"zeros": 0})
    tree, content = ObjectTree(object_id=piece.object_id), piece.deflate()
    sessions = [state.start_session(1), state.start_session(1)]
    roots = [ObjectTree(object_id=letter * 64, children=[tree]) for letter in "ab"]
    for session, root in zip(sessions, roots, strict=True):
        state.preregister_object_tree(root, session)
    state_type = type("State", (SqlLinkState,), {})
    take_pieces_twice(state_type)
    state.__class__ = state_type
    for session in ("", sessions[0], sessions[0], sessions[1]):
        assert state.store_object(1, session, tree.object_id, content)
    assert state.get_object(1, tree.object_id) == content
    assert not state.store_object(1, "", "c" * 64, content)  # of no reply


def test_database_of_another_version_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "superlink.db"
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE node (id INTEGER)")
    expect_back(file)
    assert "cannot be read (no such column" in capsys.readouterr().err
