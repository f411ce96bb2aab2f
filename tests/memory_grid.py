"""Flower's `Grid` in this process: nodes are functions from a message to its replies.

It keeps to what Flower 1.31 does: ids and sender are stamped on push, a message to an unknown
node is not accepted, a reply is delivered once, and asking again for it gives an error that the
SuperLink makes in its own name.
"""

import itertools
from collections.abc import Callable, Iterable

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid

SUPERLINK = 1
Handler = Callable[[Message], "Message | list[Message] | None"]


def superlink_error(message_id: str, code: int, reason: str) -> Message:
    """What the SuperLink answers for a node that it cannot reach."""
    metadata = Metadata(
        run_id=0,
        message_id="",
        src_node_id=SUPERLINK,
        dst_node_id=SUPERLINK,
        reply_to_message_id=message_id,
        group_id="",
        created_at=0.0,
        ttl=0,
        message_type="system",
    )
    return Message(metadata=metadata, error=Error(code, reason))


class MemoryGrid(Grid):
    """Args:
    nodes: handler of each node by id. It runs when its reply is pulled; None: no reply.
    gaps: mark messages that are not accepted by an empty id (as over gRPC), or leave them out.
    order: message ids in a pull are answered in this order of node ids, if given.
    """

    def __init__(
        self, nodes: dict[int, Handler], gaps: bool = True, order: list[int] | None = None
    ) -> None:
        self.nodes = nodes
        self.gaps = gaps
        self.order = order
        self.sent: list[Message] = []
        self.pulls = 0
        self._waiting: dict[str, Message] = {}
        self._numbers = itertools.count(1)

    def set_run(self, run) -> None:
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content: RecordDict, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_run_id"] = 5
            message.metadata.__dict__["_src_node_id"] = SUPERLINK
            message.metadata.__dict__["_message_id"] = f"message-{next(self._numbers)}"
            if message.metadata.dst_node_id in self.nodes:
                self.sent.append(message)
                self._waiting[message.metadata.message_id] = message
                ids.append(message.metadata.message_id)
            elif self.gaps:
                ids.append("")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulls += 1
        replies: list[Message] = []
        for message_id in self._ordered(list(message_ids)):
            if message_id not in self._waiting:
                replies.append(superlink_error(message_id, 3, "Message Unavailable"))
                continue
            message = self._waiting[message_id]
            answer = self.nodes[message.metadata.dst_node_id](message)
            if answer is not None:
                del self._waiting[message_id]
                replies += answer if isinstance(answer, list) else [answer]
        return replies

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

    def _ordered(self, message_ids: list[str]) -> list[str]:
        if self.order is None:
            return message_ids
        nodes = {
            i: self._waiting[i].metadata.dst_node_id for i in message_ids if i in self._waiting
        }
        return sorted(message_ids, key=lambda i: self.order.index(nodes.get(i, self.order[0])))
