"""Exchanges with the clients: send, then yield each reply as it arrives."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import grpc
from flwr.app import Message
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.superlink.grid.grpc_grid import GrpcGrid

from fedllm_flwr.config import Config
from fedllm_flwr.config.participation import min_replies, num_sampled
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.inbox import (
    BROKE_OFF,
    NO_TENSORS,
    REFUSED,
    Expected,
    Inbox,
    details_of,
    patiently,
)
from fedllm_flwr.federation.messages import ClientInfo
from fedllm_flwr.federation.wire import unpack_failure
from fedllm_flwr.params import LARGEST_WEIGHT

_TAKEN = "UNIQUE constraint failed"
_POLL_FIRST_S, _POLL_LAST_S = 0.02, 0.5
_POLL_SHARE = 0.02  # of the time waited so far: what polling adds to a round, at most
_TTL_SLACK_S = 30.0  # so that the server's clock closes a round, not the SuperLink's
_LONGEST_MODEL = 200  # characters of what a site says of its model
_LONGEST_TEXT = 500  # characters of a client's wording that are shown

# What Flower says of a node in its own codes (flwr.common.constant.ErrorCode), in an operator's
# terms. Codes 1 and 2 come with the node's own wording.
_EXPIRED, _GONE, _CRASHED = 4, 5, 8
_FLOWER_ERRORS = {
    BROKE_OFF: "its task expired before it was fetched, or its reply broke off; is its SuperNode "
    "running?",
    _EXPIRED: "its reply expired before it was complete; raise federation.round_timeout_s",
    _GONE: "its SuperNode gave no sign of life for a minute; start it, or look at the network",
    _CRASHED: "its ClientApp was killed or crashed, out of memory perhaps; the site's log says "
    "more",
}


@dataclass(frozen=True)
class Client:
    """A node that takes part: its Flower id of this run, and what it said of itself.

    ``by_key``: its name is that of a registered key, which no other node can have.
    """

    node_id: int
    info: ClientInfo
    by_key: bool = False


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
    batch = list(messages)
    message_ids = _push(grid, batch)
    if len(message_ids) != len(batch):
        accepted = set(message_ids)
        own_ids = [message.metadata.message_id for message in batch]
        message_ids = [own_id if own_id in accepted else "" for own_id in own_ids]
    pairs = zip(message_ids, batch, strict=True)
    return {message_id: message.metadata.dst_node_id for message_id, message in pairs if message_id}


def _push(grid: Grid, batch: list[Message]) -> list[str]:
    """Push `batch`, which the gRPC grid reads twice; Flower's ids.

    Where a SuperLink dies between storing a message and saying so, or is too busy for a part of
    the batch, the next try finds ids that are taken. Each message then goes alone.

    Raises:
        grpc.RpcError: any other error, or one that lasts.
    """
    if not batch:
        return []
    try:
        return list(patiently(partial(grid.push_messages, batch)))
    except grpc.RpcError as error:
        if _TAKEN not in details_of(error) or not isinstance(grid, GrpcGrid):
            raise
    return [_push_rest(grid, message) for message in batch]


def _push_rest(grid: GrpcGrid, message: Message) -> str:
    """Push what the SuperLink lacks of a message; Flower's id, "" if it was refused.

    If its metadata are stored, its objects have to follow: a site that fetches it waits for them
    for more than an hour, and takes no other message meanwhile.
    """
    try:
        return next(iter(patiently(partial(grid.push_messages, [message]))), "")
    except grpc.RpcError as error:
        if _TAKEN not in details_of(error):
            raise
    for object_id, part in get_all_nested_objects(message).items():
        request = PushObjectRequest(
            node=grid.node,
            run_id=grid.run.run_id,
            object_id=object_id,
            object_content=part.deflate(),
        )
        # One that is there already stays as it is.
        patiently(partial(grid._stub.PushObject, request))
    return message.metadata.message_id


def receive(
    inbox: Inbox, message_ids: Iterable[str], timeout_s: float, expected: Expected = NO_TENSORS
) -> Iterator[Message]:
    """Yield the replies one by one, until all came or the time is over.

    A reply that has begun to arrive in time may complete after it, within the time that the
    slowest link takes for what is `expected`.
    """
    pending = list(message_ids)
    started = time.monotonic()
    while pending:
        arrived: set[str] = set()
        for reply in inbox.take(pending, expected):
            arrived.add(reply.metadata.reply_to_message_id)
            yield reply
            del reply  # else it would stay until the next one is there
        # Never ask again for an answered message: Flower would answer with an error.
        pending = [message_id for message_id in pending if message_id not in arrived]
        waited_s = time.monotonic() - started
        pause_s = min(max(_POLL_FIRST_S, _POLL_SHARE * waited_s), _POLL_LAST_S)
        if waited_s >= timeout_s:
            pending = inbox.arriving(pending)
        else:
            pause_s = min(pause_s, timeout_s - waited_s)
        if pending:
            time.sleep(pause_s)


def failure_reason(reply: Message) -> str | None:
    """Why a reply cannot be used at all, in one line, or None."""
    if reply.has_error():
        code = reply.error.code
        if code == REFUSED:
            return f"reply refused: {printable(reply.error.reason or 'unknown')}"
        said = f"error {code}: {printable(reply.error.reason or 'unknown')}"
        return _FLOWER_ERRORS.get(code, said)
    if not reply.has_content():
        return "an empty reply"
    try:
        failure = unpack_failure(reply.content)
    except FederationError as error:
        return f"a broken failure: {error}"
    return printable(failure.reason) if failure else None


def may_answer_later(reply: Message) -> bool:
    """Whether no answer came for want of a connection, time or memory, rather than of a will."""
    return reply.has_error() and reply.error.code in _FLOWER_ERRORS


def printable(text: str) -> str:
    """The first line of a client's wording, bounded, without control characters."""
    first = next(iter(text.strip().splitlines()), "unknown")
    return "".join(char for char in first[:_LONGEST_TEXT] if char.isprintable())


def check_roster(roster: Roster, config: Config) -> None:
    """Refuse clients that are too few for a round, or too many examples for exact sums.

    Raises:
        FederationError: names the numbers.
    """
    needed, sampled = min_replies(config, len(roster)), num_sampled(config, len(roster))
    if roster and needed > sampled:
        raise FederationError(
            f"federation.min_replies={needed} exceeds the {sampled} of "
            f"{len(roster)} clients sampled per round; lower it or sample more clients."
        )
    examples = sum(client.info.num_examples for client in roster.values())
    if examples > LARGEST_WEIGHT:
        raise FederationError(
            f"the clients announce {examples} examples, more than {LARGEST_WEIGHT:.0f}; look at "
            "their data files."
        )


def unlike_models(roster: Roster) -> list[str]:
    """A warning where sites train different base models, whose updates do not add up; else none."""
    sites: dict[str, list[str]] = {}
    for name, client in sorted(roster.items()):
        model = printable(client.info.model)[:_LONGEST_MODEL] if client.info.model else ""
        sites.setdefault(model, []).append(name)
    sites.pop("", None)  # simulated clients share one model
    if len(sites) < 2:
        return []
    groups = "; ".join(f"{', '.join(names)}: {model}" for model, names in sorted(sites.items()))
    return [f"the sites do not train the same base model ({groups}); an average of theirs is none"]
