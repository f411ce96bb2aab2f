"""Flower's `Grid` of a simulation, extended by the directory of client memory."""

from collections.abc import Callable, Iterable
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedllm_flwr.client.simulated import add_state_dir


class SimulationGrid(Grid):
    """Delegates to another grid, and adds to messages where clients keep their memory of the run.

    Args:
        state_dir: in which each client has a folder of its own.
        check: called before the other grid is used; raises where the run cannot go on.
    """

    def __init__(
        self, grid: Grid, state_dir: Path, check: Callable[[], None] = lambda: None
    ) -> None:
        self._grid = grid
        self._state_dir = state_dir
        self._check = check

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
        """As the other grid; each message names the directory of the clients' memory."""
        self._check()
        return self._grid.push_messages(self._noted(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the other grid."""
        self._check()
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """As the other grid; each message names the directory of the clients' memory."""
        self._check()
        return self._grid.send_and_receive(self._noted(messages), timeout=timeout)

    def _noted(self, messages: Iterable[Message]) -> Iterable[Message]:
        for message in messages:
            add_state_dir(message.content, self._state_dir)
            yield message
