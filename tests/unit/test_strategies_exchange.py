"""Who takes part, and how replies are fetched."""

import time

import grpc
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.common.typing import Run
from flwr.proto.appio_pb2 import PullAppMessagesResponse
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.superlink.grid.grpc_grid import GrpcGrid

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import FederationConfig
from fedllm_flwr.errors import FederationError
from fedllm_flwr.messages import ClientInfo, Failure
from fedllm_flwr.strategies.census import Census, discover
from fedllm_flwr.strategies.exchange import exchange, failure_reason, receive
from fedllm_flwr.wire import pack_failure, pack_info, unpack_query
from memory_grid import SUPERLINK, MemoryGrid, superlink_error

CONFIG = Config(federation=FederationConfig(start_timeout_s=0.3))


def saying(name, size=10, version=__version__):
    def handler(message):
        unpack_query(message.content)
        return Message(pack_info(ClientInfo(name, size, version)), reply_to=message)

    return handler


def sending(content):
    return lambda message: Message(content, reply_to=message)


def test_clients_are_known_by_name_in_name_order():
    census = discover(MemoryGrid({7: saying("zoe"), 8: saying("amy", 5)}), CONFIG, wanted=2)
    clients = sorted(census.clients.items())
    assert [(n, c.node_id, c.info.num_examples) for n, c in clients] == [
        ("amy", 8, 5),
        ("zoe", 7, 10),
    ]


REFUSED = {
    "twice": (saying("amy"), "two clients are called 'amy'"),
    "old": (
        saying("bob", version="0.0.1"),
        "bob cannot take part: it runs fedllm-flwr 0.0.1, the server",
    ),
    "empty data": (saying("bob", 0), "bob cannot take part: it announces 0 examples"),
    "absurd data": (saying("bob", 10**12), "it announces 1000000000000 examples"),
    "no name": (saying(""), "it calls itself ''"),
    "long name": (saying("b" * 1000), "it calls itself 'bbb"),
    "control characters": (saying("bob\x1b[2J"), "it calls itself 'bob\\x1b[2J'"),
    "refuses": (
        sending(pack_failure(Failure("data", "no data file", "ward"))),
        "ward cannot take part: no data file",
    ),
    "crashes": (
        lambda message: Message(Error(2, "boom"), reply_to=message),
        "node 2 cannot take part: error 2: boom",
    ),
    "foreign app": (sending(RecordDict()), "node 2 cannot take part: it does not say who it is"),
    "wrong type": (
        sending(
            RecordDict(
                {"info": ConfigRecord({"name": "b", "num_examples": "many", "version": "1"})}
            )
        ),
        "node 2 cannot take part: it does not say who it is",
    ),
    "silent": (lambda message: None, "1 of 2 clients answered within 0 s"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_clients_that_cannot_take_part(case):
    handler, expected = REFUSED[case]
    with pytest.raises(FederationError) as error:
        discover(MemoryGrid({1: saying("amy"), 2: handler}), CONFIG, wanted=2)
    assert expected in str(error.value)


def deployment(**federation):
    known = {"engine": "deployment", "start_timeout_s": 0.3, "num_clients": 2}
    return Config(federation=FederationConfig(**{**known, **federation}))


def refusing(why="no data file", name="ward"):
    return sending(pack_failure(Failure("data", why, name)))


def test_start_without_those_that_refuse_where_it_may():
    told = []
    config = deployment(min_clients=1)
    census = discover(MemoryGrid({1: saying("amy"), 2: refusing()}), config, 2, told.append)
    assert list(census.clients) == ["amy"]
    assert census.refused == {"ward": "no data file"}
    assert told[-1].startswith("1 of 2 clients are there (amy), waiting ")
    assert told[-1].endswith(" s more; ward: no data file")


def test_start_that_needs_all_names_the_one_that_refuses():
    with pytest.raises(FederationError) as error:
        discover(MemoryGrid({1: saying("amy"), 2: refusing()}), deployment(), 2)
    assert str(error.value) == (
        "1 of 2 clients can take part (all are needed). ward cannot take part: no data file"
    )


def test_start_with_more_than_wanted_does_not_depend_on_one_that_refuses():
    nodes = {1: saying("amy"), 2: refusing(), 3: saying("zoe")}
    census = discover(MemoryGrid(nodes), deployment(), wanted=2)
    assert sorted(census.clients) == ["amy", "zoe"]


def test_node_that_the_superlink_has_lost_is_asked_again():
    """It still counted as online; the SuperLink answers for it, and then it is back."""
    answers = []

    def back(message):
        answers.append(message)
        if len(answers) == 1:
            return superlink_error(message.metadata.message_id, 5, "Node Unavailable")
        return saying("amy")(message)

    census = discover(MemoryGrid({1: back}), deployment(num_clients=1), wanted=1)
    assert (list(census.clients), census.refused) == (["amy"], {})


def test_client_that_comes_back_as_another_node_keeps_its_name():
    grid = MemoryGrid({1: saying("amy"), 2: saying("bob")})
    start = discover(grid, deployment(), wanted=2)
    census = Census(grid, deployment(), start.clients, closed=True)

    grid.nodes[7] = saying("bob")  # while the old one still counts as online
    assert census.settled()["bob"].node_id == 2
    assert census.take_notes() == ["a second node is called bob; it waits until the first is gone"]
    del grid.nodes[2]
    roster = census.settled()
    assert {name: client.node_id for name, client in roster.items()} == {"amy": 1, "bob": 7}
    assert start.clients["bob"].node_id == 2  # not the caller's


def test_client_that_comes_after_the_start_is_noted():
    grid = MemoryGrid({1: saying("amy")})
    start = discover(grid, deployment(), wanted=1)
    census = Census(grid, deployment(), start.clients, closed=True)
    grid.nodes[5] = saying("zoe")

    assert list(census.settled()) == ["amy"]
    assert census.take_notes() == [
        "zoe came after the start; it takes part once the run is resumed"
    ]
    asked = len(grid.sent)
    census.settled()
    assert len(grid.sent) == asked  # each node is asked once


def test_clients_that_do_not_come():
    with pytest.raises(FederationError, match="1 of 2 clients connected within 0 s"):
        discover(MemoryGrid({1: saying("amy")}), CONFIG, wanted=2)


def test_delivered_replies_are_never_asked_for_again():
    """Flower answers such a question with an error, which would look like a failed client."""
    late = []

    def slow(message):
        late.append(message)
        return Message(RecordDict(), reply_to=message) if len(late) > 2 else None

    nodes = {i: sending(RecordDict()) for i in range(1, 200)} | {500: slow}
    messages = (Message(RecordDict(), node_id, "train") for node_id in nodes)
    replies = list(exchange(MemoryGrid(nodes), messages, timeout_s=5))
    assert sorted(reply.metadata.src_node_id for reply in replies) == sorted(nodes)
    assert not any(reply.has_error() for reply in replies)


def test_large_replies_are_fetched_one_by_one():
    nodes = {i: sending(RecordDict()) for i in range(1, 9)}
    for reply_bytes, pulls in ((2**30, 8), (32 * 2**20, 4), (0, 1)):
        grid = MemoryGrid(nodes)
        messages = [Message(RecordDict(), node_id, "train") for node_id in nodes]
        assert len(list(exchange(grid, messages, 5, reply_bytes))) == 8
        assert grid.pulls == pulls


def test_nothing_to_send():
    grid = MemoryGrid({})
    assert list(exchange(grid, [], timeout_s=5)) == []
    assert grid.pulls == 0


class Busy(grpc.RpcError):
    """As the gRPC grid passes on what the SuperLink answers."""

    def __init__(self, details):
        self._details = details

    def details(self):
        return self._details


def test_busy_database_of_the_superlink_is_asked_again():
    class BusyGrid(MemoryGrid):
        def pull_messages(self, message_ids):
            self.pulls += 1
            if self.pulls == 1:
                raise Busy("Exception calling application: database is locked")
            return super().pull_messages(message_ids)

    grid = BusyGrid({1: sending(RecordDict())})
    [reply] = exchange(grid, [Message(RecordDict(), 1, "train")], timeout_s=5)
    assert not reply.has_error()


def test_messages_that_a_dying_superlink_had_stored_go_once_more():
    class RestartedGrid(MemoryGrid):
        """Stores the first message of the first batch, dies, and is asked again."""

        def push_messages(self, messages):
            messages = list(messages)
            ids = {message.object_id for message in messages}
            if not pushed:
                pushed.append(ids)
                raise Busy("(sqlite3.IntegrityError) UNIQUE constraint failed: message_ins.message")
            assert not ids & pushed[0]
            return super().push_messages(messages)

    pushed: list[set[str]] = []
    grid = RestartedGrid({1: sending(RecordDict()), 2: sending(RecordDict())})
    messages = [Message(RecordDict(), node_id, "train", ttl=9) for node_id in (1, 2)]
    replies = list(exchange(grid, messages, timeout_s=5))
    assert sorted(reply.metadata.src_node_id for reply in replies) == [1, 2]
    assert [message.metadata.ttl for message in grid.sent] == [9, 9]


def test_a_superlink_that_always_finds_ids_taken_ends_the_exchange():
    class StuckGrid(MemoryGrid):
        def push_messages(self, messages):
            self.pulls += 1
            raise Busy("UNIQUE constraint failed: message_ins.message_id")

    grid = StuckGrid({1: sending(RecordDict())})
    with pytest.raises(grpc.RpcError):
        list(exchange(grid, [Message(RecordDict(), 1, "train")], 5))
    assert grid.pulls == 5


def test_other_errors_of_the_superlink_end_the_exchange():
    class FullGrid(MemoryGrid):
        def push_messages(self, messages):
            raise Busy("Exception calling application: database or disk is full")

    with pytest.raises(grpc.RpcError):
        list(exchange(FullGrid({1: sending(RecordDict())}), [Message(RecordDict(), 1, "train")], 5))


def test_reply_that_breaks_off_is_given_up(monkeypatch):
    """A site that dies while it sends leaves a reply whose parts never come."""
    task = Message(RecordDict(), 7, "train", ttl=60)
    task.metadata.__dict__.update(_run_id=1, _src_node_id=SUPERLINK, _message_id=task.object_id)
    broken = Message(RecordDict({"a": ConfigRecord({"b": 1})}), reply_to=task)
    broken.metadata.__dict__["_message_id"] = broken.object_id

    class Stub:
        def PullMessages(self, request):  # noqa: N802
            tree = get_object_tree(broken)
            proto = message_to_proto(remove_content_from_message(broken))
            return PullAppMessagesResponse(messages_list=[proto], message_object_trees=[tree])

        def PullObject(self, request):  # noqa: N802
            return PullObjectResponse(object_found=True, object_available=False)

    monkeypatch.setattr(GrpcGrid, "_stub", property(lambda self: Stub()))
    monkeypatch.setattr("fedllm_flwr.strategies.exchange._UPLOAD_S", 0.2)
    grid = GrpcGrid(token="t")
    grid._run = Run.create_empty(1)
    started = time.monotonic()
    [reply] = receive(grid, [broken.metadata.reply_to_message_id], timeout_s=60)
    assert "its reply broke off" in failure_reason(reply)
    assert time.monotonic() - started < 10
