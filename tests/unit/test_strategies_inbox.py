"""Replies that arrive piece by piece, and such that hold what was not asked for."""

import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.federation.census import Census
from fedllm_flwr.federation.exchange import failure_reason, receive
from fedllm_flwr.federation.inbox import NO_TENSORS, Expected, SuperLinkInbox
from fedllm_flwr.federation.messages import ClientInfo
from fedllm_flwr.federation.packing import pack
from fedllm_flwr.federation.wire import pack_info, pack_params, unpack_params
from memory_grid import MemoryGrid
from superlink import RUN, StoredReplies, asked

PARAMS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.linspace(0, 1, 3 * 2**19, dtype=np.float32),  # 6 MB, two pieces
}
EXPECTED = Expected.like(delta=PARAMS)


def update():
    arrays = pack_params(PARAMS, "float32")
    settings = ConfigRecord({"dtype": "float32", "num_examples": 1})
    return RecordDict({"delta": arrays, "update": settings, "metrics": MetricRecord({"loss": 1.0})})


def replies_to(count=1, content=update):
    tasks = asked(
        Message(RecordDict(), node_id, "train", ttl=60) for node_id in range(7, 7 + count)
    )
    return [Message(content(), reply_to=task) for task in tasks]


def test_reply_that_is_still_arriving_holds_nobody_up():
    stub = StoredReplies()
    inbox = SuperLinkInbox(stub, RUN)
    slow, fast = replies_to(2)
    ids = [stub.begin(slow), stub.begin(fast)]
    stub.continue_(slow, 2)
    stub.continue_(fast)

    [first] = inbox.take(ids, EXPECTED)
    assert first.metadata.src_node_id == 8
    assert inbox.arriving(ids) == [ids[0]]
    assert list(inbox.take(ids[:1], EXPECTED)) == []
    stub.continue_(slow)
    [second] = inbox.take(ids[:1], EXPECTED)
    assert second.metadata.src_node_id == 7
    for name, values in unpack_params(second.content["delta"], "float32").items():
        assert values.tobytes() == PARAMS[name].tobytes()
    assert len(stub.store) == 0


def test_reply_that_began_in_time_may_complete_after_it():
    stub = StoredReplies()
    inbox = SuperLinkInbox(stub, RUN)
    (reply,) = replies_to()
    message_id = stub.begin(reply)

    class Slow(SuperLinkInbox):
        def take(self, message_ids, expected):
            stub.continue_(reply, 1)
            return super().take(message_ids, expected)

    inbox = Slow(stub, RUN)
    [received] = receive(inbox, [message_id], timeout_s=0.01, expected=EXPECTED)
    assert failure_reason(received) is None


def test_reply_that_breaks_off_is_given_up(monkeypatch):
    """A site that dies while it sends leaves a reply whose parts never come."""
    monkeypatch.setattr("fedllm_flwr.federation.inbox._UPLOAD_S", 0.2)
    stub = StoredReplies()
    (reply,) = replies_to(content=lambda: RecordDict({"a": ConfigRecord({"b": 1})}))
    message_id = stub.begin(reply)
    started = time.monotonic()
    [received] = receive(SuperLinkInbox(stub, RUN), [message_id], timeout_s=60)
    assert "its reply broke off" in failure_reason(received)
    assert time.monotonic() - started < 10
    assert len(stub.store) == 0


def test_census_waits_for_an_answer_that_is_still_arriving():
    """As over a link with a delay: the node is neither refused nor forgotten."""
    stub, grid = StoredReplies(), MemoryGrid({7: lambda message: None})
    census = Census(grid, Config(), inbox=SuperLinkInbox(stub, RUN))
    census.look()
    info = pack_info(ClientInfo("amy", 10, __version__))
    reply = Message(info, reply_to=grid.sent[0])
    stub.begin(reply)
    for _ in range(3):
        assert not census.look()
        assert (census.clients, census.refused, census.silent) == ({}, {}, ["node 7"])
    stub.continue_(reply)
    assert census.look()
    assert (list(census.clients), len(grid.sent)) == (["amy"], 1)


def with_arrays(**arrays):
    content = update()
    content["delta"] = ArrayRecord(arrays)
    return content


BIG = np.zeros(2**20, np.float32) + np.arange(2**20, dtype=np.float32)
HOSTILE = {
    "unknown record": (
        RecordDict({"weights": ArrayRecord({"a": Array(BIG)})}),
        "arrays 'weights' were not asked for",
    ),
    "second array": (
        with_arrays(tensors=pack({"a": PARAMS["a"]}.items()), more=Array(BIG[:2])),
        "'delta' has 2 arrays instead of one",
    ),
    "larger tensors": (
        with_arrays(tensors=pack({"a": BIG[:1000]}.items())),
        "the arrays have more bytes than the tensors asked for",
    ),
    "many pieces": (
        with_arrays(tensors=pack({"a": np.zeros(2**24, np.float32)}.items())),
        "'delta' has more bytes than the ",
    ),
    "many parts": (
        with_arrays(**{f"x{i}": Array(np.float32([i])) for i in range(40)}),
        "it has more than",
    ),
    "long metric names": (
        RecordDict({"metrics": MetricRecord({f"{i}" * 10**5: 1.0 for i in range(9)})}),
        "a record of ",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_was_not_asked_for_is_refused_before_it_is_fetched(case):
    content, expected = HOSTILE[case]
    stub = StoredReplies()
    small = Expected.like(delta={"a": PARAMS["a"]})
    (reply,) = replies_to(content=lambda: content)
    message_id = stub.begin(reply)
    stub.continue_(reply)
    [received] = SuperLinkInbox(stub, RUN).take([message_id], small)
    assert failure_reason(received).startswith("reply refused: ")
    assert expected in failure_reason(received)
    assert received.metadata.reply_to_message_id == message_id
    assert len(stub.store) == 0
    objects = get_all_nested_objects(reply)
    pulled_bytes = sum(len(objects[key].deflate()) for key in stub.pulled)
    assert pulled_bytes < 10**6


def test_nothing_but_small_records_where_no_tensors_were_asked_for():
    stub = StoredReplies()
    (reply,) = replies_to()
    message_id = stub.begin(reply)
    stub.continue_(reply)
    [received] = SuperLinkInbox(stub, RUN).take([message_id], NO_TENSORS)
    assert "arrays 'delta' were not asked for" in failure_reason(received)


def test_reply_that_names_another_sender_than_the_superlink_knows():
    """The metadata travel twice, and only those outside the reply are checked by the SuperLink."""
    stub = StoredReplies()
    (reply,) = replies_to()
    message_id = stub.begin(reply, sender=8)
    stub.continue_(reply)
    [received] = SuperLinkInbox(stub, RUN).take([message_id], EXPECTED)
    assert "it names another sender" in failure_reason(received)
