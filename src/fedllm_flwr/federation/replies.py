"""What the server makes of a reply: whose it is, and whether it can be used."""

import math
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from flwr.app import Message, RecordDict

from fedllm_flwr.errors import FederationError, NotFiniteError
from fedllm_flwr.federation.exchange import Roster, failure_reason, printable
from fedllm_flwr.federation.messages import Update
from fedllm_flwr.federation.wire import unpack_update

Content = TypeVar("Content")
_MOST_METRICS, _LONGEST_METRIC, _LARGEST_METRIC = 64, 64, 1e12
_METRIC = re.compile(r"[A-Za-z0-9_./-]{1,64}")


class Asked:
    """The clients that were asked something, by message; ties each reply to one, once.

    A reply is known by the message it answers, not by its sender: the SuperLink answers in its
    own name for a node that was lost.
    """

    def __init__(self, node_ids: Mapping[str, int], roster: Roster) -> None:
        names = {client.node_id: name for name, client in roster.items()}
        self._clients = {message_id: names[node_id] for message_id, node_id in node_ids.items()}
        self._node_ids = dict(node_ids)
        self._answered: set[str] = set()

    @property
    def names(self) -> set[str]:
        """The clients that were asked."""
        return set(self._clients.values())

    def client_of(self, reply: Message) -> str:
        """Name of the client whose answer this is.

        Raises:
            FederationError: it answers nothing that was asked, it answers for the second time,
                or another node than the one asked sent it.
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


def read_update(reply: Message) -> Update:
    """The update in a reply.

    Raises:
        FederationError: the reply is an error or a refusal, or no update can be read from it.
    """
    if reason := failure_reason(reply):
        raise FederationError(reason)
    return _decoded(reply.content, unpack_update)


def read_scores(reply: Message) -> tuple[dict[str, float], int]:
    """A client's scores of the global adapter on its own records, and how many those were.

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
    return metrics, int(count)


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Refuse metrics that lack a loss, are too many, or have names or values out of bounds.

    A round's metrics are kept in memory, written down, drawn and printed; so none may be long,
    not finite, or so large that a mean or a figure of them is not finite.

    Raises:
        FederationError: says which.
    """
    if "loss" not in metrics:
        raise FederationError("its metrics lack 'loss'")
    if len(metrics) > _MOST_METRICS:
        raise FederationError(f"it holds {len(metrics)} metrics, more than {_MOST_METRICS}")
    for name, value in metrics.items():
        if not _METRIC.fullmatch(name):
            shown = repr(name[:_LONGEST_METRIC])
            raise FederationError(
                f"it calls a metric of {len(name)} characters {shown}; at most {_LONGEST_METRIC} "
                "letters, digits and '_', '.', '/', '-' are taken"
            )
        if not abs(value) <= _LARGEST_METRIC:
            raise NotFiniteError(f"its {name} is {value:g}, not within {_LARGEST_METRIC:g} of 0")


def _unpack_scores(content: RecordDict) -> dict[str, float]:
    record = content.metric_records["metrics"]
    return {name: float(value) for name, value in record.items()}  # type: ignore[arg-type]


def _decoded(content: RecordDict, unpack: Callable[[RecordDict], Content]) -> Content:
    """What `unpack` reads; a client can send any bytes, so any error means a refusal."""
    try:
        return unpack(content)
    except FederationError:
        raise
    except Exception as error:
        text = printable(f"{type(error).__name__}: {error}")
        raise FederationError(f"it cannot be read ({text})") from error
