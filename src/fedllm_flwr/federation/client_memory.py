"""What a client remembers of a run from round to round, on its own disk."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Task
from fedllm_flwr.federation.round_store import RoundStore
from fedllm_flwr.params import Params, check_like

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClientMemory:
    """Groups of tensors as the round left them that the server has acknowledged last.

    ``lost``: the server has acknowledged a round of which this client has nothing any more.
    """

    groups: Mapping[str, Params] = field(default_factory=dict)
    lost: bool = False

    @classmethod
    def recall(cls, task: Task, directory: Path, wanted: set[str]) -> "ClientMemory":
        """The memory that `task` starts from; empty before the first acknowledged round.

        Args:
            wanted: groups with the names and shapes of the adapter that the task cannot do
                without. Without them, or with one that is damaged, the memory is lost.
        """
        acknowledged, store = task.acknowledged.round, RoundStore(directory)
        if not acknowledged or not (wanted or acknowledged in store.rounds()):
            return cls()
        groups = store.load(acknowledged)
        try:
            if groups is None:
                raise FederationError("its file cannot be used")
            for name in sorted(wanted):
                check_like(groups.get(name, {}), task.params)
        except FederationError as error:
            logger.warning(
                "round %d starts anew, the memory of round %d is lost: %s",
                *(task.round, acknowledged, error),
            )
            return cls(lost=bool(wanted))
        return cls(groups)

    @staticmethod
    def keep(task: Task, directory: Path, groups: Mapping[str, Params]) -> None:
        """Write what the next round starts from if the server acknowledges this one.

        Raises:
            FederationError: the file system refuses.
        """
        if groups:
            acknowledged = task.acknowledged.round
            RoundStore(directory).store(task.round, groups, acknowledged, task.oldest_checkpoint)
