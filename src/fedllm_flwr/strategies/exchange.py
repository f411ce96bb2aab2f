"""Exchanges with the clients: send, then yield each reply as it arrives."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import FederationConfig
from fedllm_flwr.errors import FederationError
from fedllm_flwr.messages import ClientInfo
from fedllm_flwr.params import LARGEST_WEIGHT
from fedllm_flwr.schedule import num_sampled
from fedllm_flwr.wire import pack_query, unpack_failure, unpack_info

_POLL_FIRST_S, _POLL_LAST_S = 0.02, 0.5
_POLL_SHARE = 0.02  # of the time waited so far: what polling adds to a round, at most
_BUFFER_BYTES = 64 * 2**20  # of replies fetched together
_MOST_AT_ONCE = 64
_TTL_SLACK_S = 30.0  # so that the server's clock closes a round, not the SuperLink's
_LONGEST_TEXT = 500  # characters of a client's wording that are shown
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Client:
    """A node that takes part: its Flower id of this run, and what it said of itself."""

    node_id: int
    info: ClientInfo


Roster = dict[str, Client]
"""Clients by name."""


def time_to_live(timeout_s: float) -> float:
    """Seconds after which Flower drops a message that is waited for `timeout_s`."""
    return timeout_s + _TTL_SLACK_S


def send(grid: Grid, messages: Iterable[Message]) -> dict[str, int]:
    """Push `messages`; ids of those that Flower accepted, each with the node it goes to.

    Flower refuses a message to a node that has left. The gRPC grid then returns an empty id in
    its place, or no ids at all if the batch was too large; the in-memory grid leaves it out.
    """
    batch = list(messages)  # the gRPC grid reads them twice, and refuses none
    message_ids = list(grid.push_messages(batch)) if batch else []
    if len(message_ids) != len(batch):
        accepted = set(message_ids)
        own_ids = [message.metadata.message_id for message in batch]
        message_ids = [own_id if own_id in accepted else "" for own_id in own_ids]
    pairs = zip(message_ids, batch, strict=True)
    return {message_id: message.metadata.dst_node_id for message_id, message in pairs if message_id}


def receive(
    grid: Grid, message_ids: Iterable[str], timeout_s: float, reply_bytes: int = 0
) -> Iterator[Message]:
    """Yield the replies one by one, until all came or the time is over.

    Args:
        reply_bytes: size of a reply. Those ready together are fetched a few at a time, so that
            memory does not grow with the number of clients.
    """
    at_once = max(1, min(_MOST_AT_ONCE, _BUFFER_BYTES // max(1, reply_bytes)))
    pending = list(message_ids)
    started = time.monotonic()
    while pending:
        arrived: set[str] = set()
        for start in range(0, len(pending), at_once):
            replies = list(grid.pull_messages(pending[start : start + at_once]))
            while replies:
                reply = replies.pop(0)
                arrived.add(reply.metadata.reply_to_message_id)
                yield reply
                del reply  # else it would stay until the next one is there
        # Never ask again for an answered message: Flower would answer with an error.
        pending = [message_id for message_id in pending if message_id not in arrived]
        waited_s = time.monotonic() - started
        if waited_s >= timeout_s:
            return
        if pending:
            pause_s = min(max(_POLL_FIRST_S, _POLL_SHARE * waited_s), _POLL_LAST_S)
            time.sleep(min(pause_s, timeout_s - waited_s))


def exchange(
    grid: Grid, messages: Iterable[Message], timeout_s: float, reply_bytes: int = 0
) -> Iterator[Message]:
    """`send`, then `receive`."""
    return receive(grid, send(grid, messages), timeout_s, reply_bytes)


def failure_reason(reply: Message) -> str | None:
    """Why a reply cannot be used at all, in one line, or None."""
    if reply.has_error():
        return f"error {reply.error.code}: {printable(reply.error.reason or 'unknown')}"
    if not reply.has_content():
        return "an empty reply"
    try:
        failure = unpack_failure(reply.content)
    except FederationError as error:
        return f"a broken failure: {error}"
    return printable(failure.reason) if failure else None


def printable(text: str) -> str:
    """The first line of a client's wording, bounded, without control characters."""
    first = next(iter(text.strip().splitlines()), "unknown")
    return "".join(char for char in first[:_LONGEST_TEXT] if char.isprintable())


def wait_for_nodes(grid: Grid, wanted: int, timeout_s: float) -> list[int]:
    """Ids of the connected nodes, once `wanted` of them are there.

    Raises:
        FederationError: they did not come in time.
    """
    deadline = time.monotonic() + timeout_s
    while len(node_ids := list(grid.get_node_ids())) < wanted:
        if time.monotonic() >= deadline:
            raise FederationError(
                f"{len(node_ids)} of {wanted} clients connected within {timeout_s:.0f} s; start "
                f"the missing ones (in simulation: --federation-config 'num-supernodes={wanted}'), "
                "or lower federation.num_clients or raise federation.start_timeout_s."
            )
        time.sleep(0.2)
    return node_ids


def discover(grid: Grid, config: Config, wanted: int) -> Roster:
    """Ask every connected node for its name, number of examples and package version.

    Raises:
        FederationError: too few nodes, a node that fails to answer, two nodes of one name, or a
            node with another version of this package.
    """
    timeout_s = config.federation.start_timeout_s
    node_ids = wait_for_nodes(grid, wanted, timeout_s)
    content, ttl = pack_query(config), time_to_live(timeout_s)
    messages = [
        Message(content=content, dst_node_id=node_id, message_type=MessageType.QUERY, ttl=ttl)
        for node_id in node_ids
    ]
    asked = send(grid, messages)
    roster: Roster = {}
    for reply in receive(grid, asked, timeout_s):
        if node_id := asked.pop(reply.metadata.reply_to_message_id, None):
            _admit(roster, _introduced(node_id, reply))
    if len(roster) < wanted:
        raise FederationError(
            f"{len(roster)} of {wanted} clients answered within {timeout_s:.0f} s; look at the "
            "logs of the others, or raise federation.start_timeout_s."
        )
    return dict(sorted(roster.items()))


def check_roster(roster: Roster, federation: FederationConfig) -> None:
    """Refuse clients that are too few for a round, or too many examples for exact sums.

    Raises:
        FederationError: names the numbers.
    """
    sampled = num_sampled(federation, len(roster))
    if roster and federation.min_replies > sampled:
        raise FederationError(
            f"federation.min_replies={federation.min_replies} exceeds the {sampled} of "
            f"{len(roster)} clients sampled per round; lower it or sample more clients."
        )
    examples = sum(client.info.num_examples for client in roster.values())
    if examples > LARGEST_WEIGHT:
        raise FederationError(
            f"the clients announce {examples} examples, more than {LARGEST_WEIGHT:.0f}; look at "
            "their data files."
        )


def _introduced(node_id: int, reply: Message) -> Client:
    if reason := failure_reason(reply):
        raise FederationError(f"{_called(reply)} refused to take part: {reason} (node {node_id})")
    try:
        return Client(node_id, unpack_info(reply.content))
    except FederationError as error:
        raise FederationError(
            f"node {node_id} does not say who it is ({error}); does it run fedllm-flwr "
            f"{__version__}?"
        ) from error


def _called(reply: Message) -> str:
    """What a client that failed calls itself, as far as it says so."""
    try:
        failure = unpack_failure(reply.content) if reply.has_content() else None
    except FederationError:
        failure = None
    return printable(failure.client) if failure and failure.client else "a client"


def _admit(roster: Roster, client: Client) -> None:
    name, size, version = client.info.name, client.info.num_examples, client.info.version
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise FederationError(
            f"a client calls itself {name[:_LONGEST_NAME]!r}; give it a client-name of 1 to "
            f"{_LONGEST_NAME} printable characters in its node config."
        )
    if name in roster:
        raise FederationError(
            f"two clients are called {name!r}; give each its own client-name in its node config."
        )
    if version != __version__:
        raise FederationError(
            f"{name} runs fedllm-flwr {printable(version)}, the server {__version__}; install "
            "one version."
        )
    if not 1 <= size <= LARGEST_WEIGHT:
        raise FederationError(f"{name} announces {size} examples; look at its data file.")
    roster[name] = client
