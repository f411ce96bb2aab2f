"""Who takes part, and how replies are fetched."""

from dataclasses import replace

import grpc
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import FederationConfig, PrivacyConfig
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.census import Census, discover
from fedllm_flwr.federation.exchange import receive, send
from fedllm_flwr.federation.inbox import NO_TENSORS, Expected, open_inbox
from fedllm_flwr.federation.messages import ClientInfo, Failure
from fedllm_flwr.federation.roster import Client, unlike_models
from fedllm_flwr.federation.secure.keys import make_card, new_identity, new_run_key
from fedllm_flwr.federation.wire import pack_failure, pack_info, unpack_query
from memory_grid import MemoryGrid, superlink_error
from superlink import StoredMessages

CONFIG = Config(federation=FederationConfig(start_timeout_s=0.3))


def saying(name, size=10, version=__version__, card=""):
    def handler(message):
        unpack_query(message.content)
        return Message(pack_info(ClientInfo(name, size, version, card=card)), reply_to=message)

    return handler


def sending(content):
    return lambda message: Message(content, reply_to=message)


def exchange(grid, messages, timeout_s, expected=NO_TENSORS):
    return receive(open_inbox(grid), send(grid, messages), timeout_s, expected)


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
    "foreign app": (sending(RecordDict()), "node 2 cannot take part: it does not identify itself"),
    "wrong type": (
        sending(
            RecordDict(
                {"info": ConfigRecord({"name": "b", "num_examples": "many", "version": "1"})}
            )
        ),
        "node 2 cannot take part: it does not identify itself",
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
    assert told[-1].startswith("1 of 2 clients are connected (amy), waiting ")
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


ASKED_AGAIN = {
    "expired or broke off": lambda m: superlink_error(m.metadata.message_id, 3, "Unavailable"),
    "reply expired": lambda m: superlink_error(m.metadata.message_id, 4, "Unavailable"),
    "lost": lambda m: superlink_error(m.metadata.message_id, 5, "Node Unavailable"),
    "crashed": lambda m: Message(Error(8, "ClientApp crashed"), reply_to=m),
    "approval": lambda m: Message(
        pack_failure(Failure("ApprovalPending", "waiting for approval at amy", "amy")), reply_to=m
    ),
}


@pytest.mark.parametrize("case", ASKED_AGAIN)
def test_node_that_could_not_answer_is_asked_again(case, monkeypatch):
    monkeypatch.setattr("fedllm_flwr.federation.census._APPROVAL_S", 0.05)
    monkeypatch.setattr("fedllm_flwr.federation.census._AGAIN_FIRST_S", 0.05)
    answers, told = [], []

    def back(message):
        answers.append(message)
        return (ASKED_AGAIN[case] if len(answers) < 4 else saying("amy"))(message)

    config = deployment(num_clients=1, start_timeout_s=20)
    census = discover(MemoryGrid({1: back}), config, 1, told.append)
    assert (list(census.clients), census.refused, census.waiting) == (["amy"], {}, {})
    assert len({message.metadata.message_id for message in answers}) == 4
    if case == "approval":
        assert told[0].startswith("0 of 1 clients are connected, waiting ")
        assert told[0].endswith(" s more; amy: waiting for approval at amy")


def test_site_that_never_answers_is_named_with_the_last_reason():
    crashing = ASKED_AGAIN["crashed"]
    with pytest.raises(FederationError) as error:
        discover(MemoryGrid({1: saying("amy"), 2: crashing}), deployment(), 2)
    assert (
        "1 of 2 clients can take part (all are needed). node 2 cannot take part: its ClientApp"
        in (str(error.value))
    )


@pytest.mark.parametrize(
    "name", ["=cmd|' /C calc'!A0", "amy ", " amy", "аmy", "a/b", "a" * 64, "@a"]
)
def test_names_of_sites_have_one_alphabet(name):
    """No formula of a spreadsheet, no blank at an end, no look-alike (here a Cyrillic letter)."""
    grid = MemoryGrid({1: saying("bob"), 2: saying(name)})
    census = discover(grid, deployment(min_clients=1), 2)
    assert list(census.clients) == ["bob"]
    [why] = census.refused.values()
    assert "use letters, digits, '.', '_' and '-'" in why


KEYS = {1: "amy", 2: "bob", 3: "zoe"}


def test_missing_and_silent_sites_are_named():
    told = []
    grid = MemoryGrid({1: saying("amy"), 2: lambda message: None})
    with pytest.raises(FederationError) as error:
        discover(grid, deployment(num_clients=3), 3, told.append, KEYS)
    others = "; bob: connected, no answer yet; zoe: registered, not connected"
    assert told[-1].endswith(f" s more{others}")
    assert "No answer yet: bob. Not connected: zoe." in str(error.value)


def test_name_belongs_to_its_key():
    """Neither a registered site nor a stranger takes another's name; the start goes on."""
    nodes = {1: saying("amy"), 2: saying("amy"), 3: saying("zoe"), 9: saying("bob")}
    for order in ([1, 2, 3, 9], [9, 3, 2, 1]):
        config = deployment(min_clients=2, num_clients=3)
        census = discover(MemoryGrid(nodes, order=order), config, 3, registered=KEYS)
        assert {name: client.node_id for name, client in census.clients.items()} == {
            "amy": 1,
            "zoe": 3,
        }
        assert set(census.refused) == {"bob", "node 9"}
        assert "its key is registered as bob, but it calls itself 'amy'" in census.refused["bob"]
        assert (
            "it calls itself bob, which is the name of another site's key"
            in (census.refused["node 9"])
        )


def test_a_site_whose_keys_of_the_run_are_not_its_own_is_named_before_the_first_round():
    identity, private = new_identity(), new_run_key()
    own = make_card(identity, private, "5", "bob")  # MemoryGrid's run
    other = make_card(new_identity(), private, "5", "bob")
    unsigned = replace(own, public=make_card(identity, new_run_key(), "5", "bob").public)
    stale = make_card(identity, private, "4", "bob")
    config = deployment(min_clients=1, sample_fraction=1.0)
    config = replace(config, privacy=PrivacyConfig(secure_aggregation=True))
    amy = make_card(new_identity(), new_run_key(), "5", "amy").to_text()
    for card, said in (
        (own.to_text(), None),
        (other.to_text(), "signed with another key than the one that is registered as bob"),
        (unsigned.to_text(), "not signed for this run"),
        (stale.to_text(), "not signed for this run"),
        ("", "not signed for this run"),
    ):
        nodes = {1: saying("amy", card=amy), 2: saying("bob", card=card)}
        keys = {"bob": own.identity}
        census = discover(MemoryGrid(nodes), config, 2, registered=KEYS, keys=keys)
        assert sorted(census.clients) == (["amy"] if said else ["amy", "bob"])
        assert said is None or said in census.refused["bob"]


def test_no_other_node_takes_the_place_of_a_registered_site():
    grid = MemoryGrid({1: saying("amy"), 2: saying("bob"), 3: saying("zoe")})
    start = discover(grid, deployment(), 3, registered=KEYS)
    census = Census(grid, deployment(), start.clients, closed=True)
    grid.nodes[7] = saying("bob")
    census.settled()
    del grid.nodes[2]
    assert census.settled()["bob"].node_id == 2
    assert "node 7 is left out: two clients are called 'bob'" in census.take_notes()[0]


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
        "zoe joined after the start; it takes part once the run is resumed"
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
    for size, pulls in ((2**30, 8), (2**25, 4), (0, 1)):
        grid = MemoryGrid(nodes)
        messages = [Message(RecordDict(), node_id, "train") for node_id in nodes]
        expected = Expected({"delta": size})
        assert len(list(exchange(grid, messages, 5, expected))) == 8
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


@pytest.mark.parametrize("stored", [1, 2])
def test_messages_that_a_dying_superlink_had_stored_get_their_objects(stored):
    """A site would wait for them for ever, as the message that it was handed first."""
    stub = StoredMessages(dies_after=stored)
    content = RecordDict({"settings": ConfigRecord({"dtype": "float32"})})
    messages = [Message(content, node_id, "train", ttl=9) for node_id in (7, 8, 9)]
    sent = send(stub.grid(), messages)
    assert list(sent.values()) == [7, 8, 9]
    assert list(sent) == [message.object_id for message in messages] == stub.messages
    for message in messages:
        for object_id, part in get_all_nested_objects(message).items():
            assert stub.store.get(object_id) == part.deflate()


def test_other_errors_of_the_superlink_end_the_exchange():
    class FullGrid(MemoryGrid):
        def push_messages(self, messages):
            raise Busy("Exception calling application: database or disk is full")

    with pytest.raises(grpc.RpcError):
        list(exchange(FullGrid({1: sending(RecordDict())}), [Message(RecordDict(), 1, "train")], 5))


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({"a": "", "b": ""}, ""),  # simulated clients
        ({"a": "org/m@c0ffee", "b": "org/m@c0ffee"}, ""),
        ({"a": "sha256:11", "b": "sha256:22", "c": "sha256:11"}, "(a, c: sha256:11; b: sha256:22)"),
        ({"a": "embedded", "b": "x\x1b[2J" + 5000 * "y"}, "x[2Jyyy"),
    ],
)
def test_sites_with_other_base_models_are_named(models: dict[str, str], said: str) -> None:
    roster = {
        name: Client(i, ClientInfo(name, 9, __version__, model))
        for i, (name, model) in enumerate(models.items())
    }
    warnings = unlike_models(roster)
    assert len(warnings) == bool(said)
    assert all(said in line and line.isprintable() and len(line) < 400 for line in warnings)
