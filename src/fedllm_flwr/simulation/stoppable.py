"""A grid that can be told to stop, so that Ctrl-C ends a run between two looks for replies."""

import threading
from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid


class StoppableGrid(Grid):
    """Hands everything to another grid until `stop` is set; then raises KeyboardInterrupt."""

    def __init__(self, grid: Grid, stop: threading.Event) -> None:
        self._grid = grid
        self._stop = stop

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
        """As the other grid."""
        self._check()
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the other grid."""
        self._check()
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the other grid."""
        self._check()
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """As the other grid."""
        self._check()
        return self._grid.send_and_receive(messages, timeout=timeout)

    def _check(self) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt
