"""Frames between a ClientApp and the resident trainer."""

import contextlib
import json
import os
import socket
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.client.resident.protocol import receive_frame, send_frame
from fedllm_flwr.client.resident.worker import serve
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.wire import unpack_failure
from processes import wait_for

DTYPES = st.sampled_from(["float32", "int16", "float64", "uint8"])
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(min_size=1, max_size=8)
VALUES = st.one_of(
    *(st.text(), st.integers(-(2**40), 2**40), st.booleans(), st.floats(-1e9, 1e9), st.binary())
)


@st.composite
def contents(draw: st.DrawFn) -> RecordDict:
    record = RecordDict()
    for name in draw(st.lists(NAMES, unique=True, max_size=3)):
        shapes = draw(st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), max_size=3))
        arrays = {key: Array(np.full(shape, 3, dtype)) for key, (dtype, shape) in shapes.items()}
        record[f"a{name}"] = ArrayRecord(arrays)
    for name, values in draw(st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES))).items():
        record[f"c{name}"] = ConfigRecord(values)
    numbers = st.one_of(st.integers(0, 9), st.floats(allow_nan=False))
    record["m"] = MetricRecord(draw(st.dictionaries(NAMES, numbers)))
    return record


def through_a_socket(fields: dict[str, object], content: RecordDict) -> tuple[object, RecordDict]:
    left, right = socket.socketpair()
    with left, right:
        sender = threading.Thread(target=send_frame, args=(left, fields, content))
        sender.start()
        received = receive_frame(right)
        sender.join()
    return received


@given(contents())
@settings(max_examples=50, deadline=None)
def test_records_arrive_as_they_were(content: RecordDict) -> None:
    fields = {"kind": "train", "node_config": {"client-name": "höhle\n"}, "run_id": 2**63}

    arrived_fields, arrived = through_a_socket(fields, content)

    assert arrived_fields == fields
    assert arrived == content
    for name, record in content.array_records.items():
        for key, array in record.items():
            assert np.array_equal(arrived.array_records[name][key].numpy(), array.numpy())


def test_not_a_number_arrives() -> None:
    _, arrived = through_a_socket({}, RecordDict({"m": MetricRecord({"loss": float("nan")})}))
    assert np.isnan(float(str(arrived.metric_records["m"]["loss"])))


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack(">Q", 2**60),
        struct.pack(">Q", 3) + b"abc",
        struct.pack(">Q", 2) + b"{}",
        struct.pack(">Q", 4) + b"\xff\xfe\x00\x01",
    ],
)
def test_other_bytes_are_refused(frame: bytes) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(frame)
        with pytest.raises(FederationError, match="message of this package"):
            receive_frame(right)


HEADER = {"fields": {}, "arrays": [], "empty": [], "config": {}, "metric": {}}
WRONG = {
    "no object": b"[]",
    "a number": b"7",
    "fields of another type": json.dumps({**HEADER, "fields": [1]}).encode(),
    "records of another type": json.dumps({**HEADER, "config": [1]}).encode(),
    "a value that no record takes": json.dumps({**HEADER, "config": {"a": {"b": {}}}}).encode(),
    "arrays of another type": json.dumps({**HEADER, "arrays": 5}).encode(),
    "a negative size": json.dumps(
        {**HEADER, "arrays": [["a", "b", "f", [1], "numpy.ndarray", -1]]}
    ).encode(),
    "no size": json.dumps(
        {**HEADER, "arrays": [["a", "b", "f", [1], "numpy.ndarray", "many"]]}
    ).encode(),
    "an exabyte that never comes": json.dumps(
        {**HEADER, "arrays": [["a", "b", "f", [1], "numpy.ndarray", 2**60]]}
    ).encode(),
    "nested without end": b"[" * 10**6,
    "no kind": json.dumps(HEADER).encode(),
    "a site of another type": json.dumps(
        {**HEADER, "fields": {"kind": "query", "node_config": [], "run_id": 1, "node_id": 2}}
    ).encode(),
    "a run of another type": json.dumps(
        {**HEADER, "fields": {"kind": "query", "node_config": {}, "run_id": "x", "node_id": 2}}
    ).encode(),
    "a kind that does not exist": json.dumps(
        {**HEADER, "fields": {"kind": "shutdown", "node_config": {}, "run_id": 1, "node_id": 2}}
    ).encode(),
}


def test_no_frame_ends_the_trainer(tmp_path: Path) -> None:
    """One after the other to a real one, which answers a message after each."""
    path = tmp_path / "trainer.sock"
    ended = threading.Event()

    def trainer() -> None:
        serve(path, os.getpid(), idle_timeout_s=2.0)
        ended.set()

    threading.Thread(target=trainer, daemon=True).start()
    question = {"kind": "query", "node_config": {"client-name": "a"}, "run_id": 1, "node_id": 2}
    for name, header in WRONG.items():
        with connected(path) as peer, contextlib.suppress(OSError):
            peer.sendall(struct.pack(">Q", len(header)) + header)
            peer.shutdown(socket.SHUT_WR)
            peer.recv(1)
        with connected(path) as peer:
            send_frame(peer, question, RecordDict())
            failure = unpack_failure(receive_frame(peer)[1])
        assert failure is not None, name
        assert failure.kind == "FederationError", name  # the question lacks what a query holds
    assert ended.wait(60)


def connected(path: Path) -> socket.socket:
    """A connection to a trainer that may still be starting."""
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(60)
    assert wait_for(path.exists, 60)
    peer.connect(str(path))
    return peer


def test_a_peer_that_leaves_in_the_middle_is_noticed() -> None:
    left, right = socket.socketpair()
    with right:
        left.sendall(struct.pack(">Q", 100) + b"{")
        left.close()
        with pytest.raises(EOFError):
            receive_frame(right)
