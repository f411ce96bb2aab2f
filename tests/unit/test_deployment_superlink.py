"""The server's SuperLink waits for its database for longer than Flower's own does."""

import subprocess
import sys
from pathlib import Path

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


def test_query_outlasts_a_lock_that_ends_flowers_own(tmp_path: Path) -> None:
    """Flower's own limit is 5 s."""
    done = subprocess.run(
        [sys.executable, "-c", STORING], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert 6 < float(done.stdout) < 30
