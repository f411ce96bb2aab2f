"""One exchange with the clients: send, then yield each reply as it arrives."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.errors import FederationError
from fedllm_flwr.messages import ClientInfo
from fedllm_flwr.wire import pack_query, unpack_failure, unpack_info

_POLL_FIRST_S = 0.02
_POLL_LAST_S = 0.5
_PULL_AT_ONCE = 4  # replies held in memory together


@dataclass(frozen=True)
class Client:
    """A node that takes part: its Flower id of this run, and what it said of itself."""

    node_id: int
    info: ClientInfo


Roster = dict[str, Client]
"""Clients by name."""


def exchange(grid: Grid, messages: Iterable[Message], timeout_s: float) -> Iterator[Message]:
    """Send `messages` and yield the replies one by one, until all came or the time is over.

    Replies that are ready together are fetched a few at a time, so that memory does not grow
    with the number of clients.
    """
    pending = list(grid.push_messages(messages))
    deadline = time.monotonic() + timeout_s
    pause = _POLL_FIRST_S
    while pending and time.monotonic() < deadline:
        arrived: set[str] = set()
        for start in range(0, len(pending), _PULL_AT_ONCE):
            for reply in grid.pull_messages(pending[start : start + _PULL_AT_ONCE]):
                arrived.add(reply.metadata.reply_to_message_id)
                yield reply
        pending = [message_id for message_id in pending if message_id not in arrived]
        pause = _POLL_FIRST_S if arrived else min(2 * pause, _POLL_LAST_S)
        time.sleep(pause if pending else 0)


def failure_reason(reply: Message) -> str | None:
    """Why a reply cannot be used at all, or None."""
    if reply.has_error():
        return f"error {reply.error.code}: {_first_line(reply.error.reason)}"
    if failure := unpack_failure(reply.content):
        return failure.reason
    return None


def wait_for_nodes(grid: Grid, wanted: int, timeout_s: float) -> list[int]:
    """Ids of the connected nodes, once `wanted` of them are there.

    Raises:
        FederationError: they did not come in time.
    """
    deadline = time.monotonic() + timeout_s
    while len(node_ids := list(grid.get_node_ids())) < wanted:
        if time.monotonic() >= deadline:
            raise FederationError(
                f"{len(node_ids)} of {wanted} clients connected within {timeout_s:.0f} s; start the "
                "missing ones, or lower federation.num_clients or raise federation.start_timeout_s."
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
    content = pack_query(config)
    messages = [
        Message(content=content, dst_node_id=node_id, message_type=MessageType.QUERY)
        for node_id in node_ids
    ]
    roster: Roster = {}
    for reply in exchange(grid, messages, timeout_s):
        if reason := failure_reason(reply):
            raise FederationError(f"a client refused to take part: {reason}")
        _admit(roster, Client(reply.metadata.src_node_id, unpack_info(reply.content)))
    if len(roster) < wanted:
        raise FederationError(
            f"{len(roster)} of {wanted} clients answered within {timeout_s:.0f} s; look at the logs "
            "of the others, or raise federation.start_timeout_s."
        )
    return dict(sorted(roster.items()))


def _admit(roster: Roster, client: Client) -> None:
    name, version = client.info.name, client.info.version
    if name in roster:
        raise FederationError(
            f"two clients are called {name!r}; give each its own client-name in its node config."
        )
    if version != __version__:
        raise FederationError(
            f"{name} runs fedllm-flwr {version}, the server {__version__}; install one version."
        )
    roster[name] = client


def _first_line(text: str | None) -> str:
    return (text or "unknown").strip().splitlines()[0]
