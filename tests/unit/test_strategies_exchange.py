"""Who takes part, and how replies are fetched."""

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import FederationConfig
from fedllm_flwr.errors import FederationError
from fedllm_flwr.messages import ClientInfo, Failure
from fedllm_flwr.strategies.census import discover
from fedllm_flwr.strategies.exchange import exchange
from fedllm_flwr.wire import pack_failure, pack_info, unpack_query
from memory_grid import MemoryGrid

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
