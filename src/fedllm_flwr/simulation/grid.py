"""Flower's `Grid` of a simulation, extended by the directory of client memory."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedllm_flwr.client.simulated import add_note

_POLL_S = 0.02

MOST_NODES = 64
"""Largest number of nodes of a simulation: Flower polls all of them ten times a second."""


class SimulationGrid(Grid):
    """Presents every simulated client as a node, and reaches it through a node of another grid.

    Each message names its client, so that any node of the other grid can act as any client. The
    other grid needs only as many nodes as answer at the same time.

    Args:
        num_clients: number of clients; this grid's node ids are 1 to `num_clients`.
        state_dir: directory with one folder per client.
        check: called before the other grid is used; raises if the run cannot continue.
    """

    def __init__(
        self,
        grid: Grid,
        num_clients: int,
        state_dir: Path,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._grid = grid
        self._num_clients = num_clients
        self._state_dir = state_dir
        self._check = check
        self._nodes: list[int] = []
        self._asked: dict[str, int] = {}  # clients by message id

    def set_run(self, run: object) -> None:
        """As the other grid."""
        self._grid.set_run(run)  # type: ignore[arg-type]  # Flower's Run is not public

    @property
    def run(self) -> object:  # type: ignore[override]
        """As the other grid."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As the other grid."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all clients, once the other grid has its nodes."""
        self._check()
        self._nodes = self._nodes or sorted(self._grid.get_node_ids())
        return list(range(1, self._num_clients + 1)) if self._nodes else []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the other grid; each message names its client and the directory of their memory."""
        self._check()
        batch = list(messages)
        clients = [message.metadata.dst_node_id for message in batch]
        message_ids = list(self._grid.push_messages([self._addressed(one) for one in batch]))
        self._asked |= dict(zip((one.metadata.message_id for one in batch), clients, strict=True))
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the other grid; each reply comes from its client."""
        self._check()
        for reply in self._grid.pull_messages(message_ids):
            client = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if client is not None:
                reply.metadata.__dict__["_src_node_id"] = client  # Flower's are read-only
            yield reply

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """As the other grid; each message names its client and the directory of their memory."""
        message_ids = set(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while message_ids and (end is None or time.monotonic() < end):
            arrived = list(self.pull_messages(message_ids))
            message_ids -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
            if not arrived:
                time.sleep(_POLL_S)
        return replies

    def _addressed(self, message: Message) -> Message:
        client = message.metadata.dst_node_id
        message.content = RecordDict(dict(message.content))  # messages may share contents
        add_note(message.content, self._state_dir, client - 1)
        node_id = self._nodes[(client - 1) % len(self._nodes)]
        message.metadata.__dict__["_dst_node_id"] = node_id
        return message
