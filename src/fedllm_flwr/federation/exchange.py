"""Exchanges with the clients: send, then yield each reply as it arrives."""

import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.inbox import (
    BROKE_OFF,
    NO_TENSORS,
    REFUSED,
    Expected,
    Inbox,
)
from fedllm_flwr.federation.messages import printable
from fedllm_flwr.federation.wire import unpack_failure
from fedllm_flwr.flower.names import find
from fedllm_flwr.flower.runtime import (
    call_errors,
    details_of,
    is_superlink_grid,
    patiently,
    runtime_client,
)

_TAKEN = "UNIQUE constraint failed"
_POLL_FIRST_S, _POLL_LAST_S = 0.02, 0.5
_POLL_SHARE = 0.02  # poll interval as a fraction of the time waited: polling's largest delay
_TTL_SLACK_S = 30.0  # lets the server's timeout close a round before the SuperLink's

# Flower's error codes for a node (flwr.common.constant.ErrorCode), explained for an operator.
# Codes 1 and 2 come with the node's own message.
_EXPIRED, _GONE, _CRASHED = 4, 5, 8
_FLOWER_ERRORS = {
    BROKE_OFF: "its task expired before it was fetched, or its reply broke off; is its SuperNode "
    "running?",
    _EXPIRED: "its reply expired before it was complete; raise federation.round_timeout_s",
    _GONE: "its SuperNode gave no sign of life for a minute; start it, or check the network",
    _CRASHED: "its ClientApp was killed or crashed, out of memory perhaps; the site's log says "
    "more",
}


def time_to_live(timeout_s: float) -> float:
    """Seconds after which Flower drops a message whose reply may take `timeout_s`."""
    return timeout_s + _TTL_SLACK_S


def send(grid: Grid, messages: Iterable[Message]) -> dict[str, int]:
    """Push `messages`; return the ids of those that Flower accepted, with their receiving nodes.

    Flower rejects a message to a node that has left. The gRPC grid then returns an empty id in
    its place, or no ids at all if the batch was too large; the in-memory grid omits it.
    """
    batch = list(messages)
    node_ids = [message.metadata.dst_node_id for message in batch]
    message_ids = _push(grid, batch)
    if len(message_ids) != len(batch):
        accepted = set(message_ids)
        own_ids = [message.metadata.message_id for message in batch]
        message_ids = [own_id if own_id in accepted else "" for own_id in own_ids]
    pairs = zip(message_ids, node_ids, strict=True)
    return {message_id: node_id for message_id, node_id in pairs if message_id}


def _push(grid: Grid, batch: list[Message]) -> list[str]:
    """Push `batch`, which a SuperLink's grid iterates twice; return Flower's ids.

    If a SuperLink of Flower 1.31 dies after storing a message but before answering, or is too busy
    for a part of the batch, the next attempt finds some ids taken. Each message is then pushed
    separately. A SuperLink of 1.42 accepts a message twice, and asks for its missing parts.

    Raises:
        Exception: one of `flower.runtime.call_errors`: any other error, or one that persists.
    """
    if not batch:
        return []
    try:
        return list(patiently(partial(grid.push_messages, batch)))
    except call_errors() as error:
        if _TAKEN not in details_of(error) or not is_superlink_grid(grid):
            raise
    return [_push_rest(grid, message) for message in batch]


def _push_rest(grid: Any, message: Message) -> str:
    """Push the missing parts of a message; return Flower's id, or "" if it was rejected.

    Once its metadata are stored, its objects must follow: a site that fetches the message waits for
    them for more than an hour, and fetches no other message meanwhile.
    """
    try:
        return next(iter(patiently(partial(grid.push_messages, [message]))), "")
    except call_errors() as error:
        if _TAKEN not in details_of(error):
            raise
    for object_id, part in find("get_all_nested_objects")(message).items():
        request = find("PushObjectRequest")(
            node=grid.node,
            run_id=grid.run.run_id,
            object_id=object_id,
            object_content=part.deflate(),
        )
        # An object that the SuperLink already has is not replaced.
        patiently(partial(runtime_client(grid).PushObject, request))
    return message.metadata.message_id


def receive(
    inbox: Inbox, message_ids: Iterable[str], timeout_s: float, expected: Expected = NO_TENSORS
) -> Iterator[Message]:
    """Yield the replies one by one, until all have arrived or the timeout has passed.

    A reply that has begun to arrive before the timeout may complete after it, within the time that
    the slowest supported link needs for a reply of the `expected` size.
    """
    pending = list(message_ids)
    started = time.monotonic()
    while pending:
        arrived: set[str] = set()
        for reply in inbox.take(pending, expected):
            arrived.add(reply.metadata.reply_to_message_id)
            yield reply
            del reply  # otherwise it stays in memory until the next one arrives
        # Never ask again for a message that was answered: Flower would return an error.
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
        return f"an unreadable failure: {error}"
    return printable(failure.reason) if failure else None


def failure_kind(reply: Message) -> str | None:
    """The kind of a client's `Failure`."""
    try:
        failure = unpack_failure(reply.content) if reply.has_content() else None
    except FederationError:
        return None
    return failure.kind if failure else None


def may_answer_later(reply: Message) -> bool:
    """Whether a node failed to answer for lack of a connection, time or memory, not by refusing."""
    return reply.has_error() and reply.error.code in _FLOWER_ERRORS
