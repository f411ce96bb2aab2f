"""Reads replies: which client a reply belongs to, and whether it is usable."""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from flwr.app import Message, RecordDict

from fedllm_flwr.errors import FederationError, LostDownloadError
from fedllm_flwr.federation.exchange import failure_kind, failure_reason
from fedllm_flwr.federation.messages import (
    LocalScores,
    MaskedUpdate,
    Update,
    check_metrics,
    printable,
)
from fedllm_flwr.federation.roster import Roster
from fedllm_flwr.federation.secure.site import Opened, Signed
from fedllm_flwr.federation.wire import unpack_opened, unpack_signed, unpack_update

Content = TypeVar("Content")


class Asked:
    """The clients that were sent a request, by message id; matches each reply to one client.

    A reply is matched by the message that it answers, not by its sender, because the SuperLink
    answers in its own name for a node that was lost.
    """

    def __init__(self, node_ids: Mapping[str, int], roster: Roster) -> None:
        names = {client.node_id: name for name, client in roster.items()}
        self._clients = {message_id: names[node_id] for message_id, node_id in node_ids.items()}
        self._node_ids = dict(node_ids)
        self._answered: set[str] = set()

    @property
    def names(self) -> set[str]:
        """The clients that were sent a request."""
        return set(self._clients.values())

    def client_of(self, reply: Message) -> str:
        """Name of the client that this reply belongs to.

        Raises:
            FederationError: it answers no request of this exchange, it is a duplicate, or the wrong
                node sent it.
        """
        message_id, sender = reply.metadata.reply_to_message_id, reply.metadata.src_node_id
        name = self._clients.get(message_id)
        if name is None:
            raise FederationError(f"a reply of node {sender} to no message of this round")
        if not reply.has_error() and sender != self._node_ids[message_id]:
            raise FederationError(f"a reply for {name} that node {sender} sent")
        if message_id in self._answered:
            raise FederationError(f"a second reply of {name}")
        self._answered.add(message_id)
        return name


def read_update(reply: Message) -> Update | MaskedUpdate:
    """The update in a reply.

    Raises:
        LostDownloadError: the client cannot follow the steps of its download.
        FederationError: the reply is an error or a refusal, or no update can be read from it.
    """
    if reason := failure_reason(reply):
        lost = failure_kind(reply) == LostDownloadError.__name__
        raise (LostDownloadError if lost else FederationError)(reason)
    return _decoded(reply.content, unpack_update)


def read_signed(reply: Message) -> Signed:
    """The signature in a reply.

    Raises:
        FederationError: the reply is an error or a refusal, or holds no signature.
    """
    if reason := failure_reason(reply):
        raise FederationError(reason)
    return _decoded(reply.content, unpack_signed)


def read_opened(reply: Message) -> Opened:
    """The shares in a reply.

    Raises:
        FederationError: the reply is an error or a refusal, or no shares can be read from it.
    """
    if reason := failure_reason(reply):
        raise FederationError(reason)
    return _decoded(reply.content, unpack_opened)


def read_scores(reply: Message) -> LocalScores:
    """A client's scores of the global adapter on its own records.

    Raises:
        FederationError: the reply is an error or a refusal, or lacks a usable loss or count.
    """
    if reason := failure_reason(reply):
        raise FederationError(reason)
    metrics = _decoded(reply.content, _unpack_scores)
    check_metrics(metrics)
    count = metrics.pop("num_examples", 0.0)
    if not (count >= 1 and math.isfinite(count) and count == int(count)):
        raise FederationError(f"scores refused: num_examples={count:g} is no count")
    return LocalScores(metrics, int(count))


def _unpack_scores(content: RecordDict) -> dict[str, float]:
    record = content.metric_records["metrics"]
    return {name: float(value) for name, value in record.items()}  # type: ignore[arg-type]


def _decoded(content: RecordDict, unpack: Callable[[RecordDict], Content]) -> Content:
    """The result of `unpack`; a client can send any bytes, so every error rejects the reply."""
    try:
        return unpack(content)
    except FederationError:
        raise
    except Exception as error:
        text = printable(f"{type(error).__name__}: {error}")
        raise FederationError(f"it cannot be read ({text})") from error
