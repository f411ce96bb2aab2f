"""Client memory: tensors that a client keeps on its own disk between the rounds of a run.

Rules and training tasks keep tensors by kind: SCAFFOLD keeps its control variate as ``control``,
local training its own adapter as ``adapter``, and preference tasks the reference model's
log-probabilities as ``reference``. A round starts from exactly the version that the server has
acknowledged.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Assignment
from fedllm_flwr.federation.round_store import RoundStore
from fedllm_flwr.params import Groups, Kept, check_like

logger = logging.getLogger(__name__)

RECEIVED = "received"
"""Kind of client memory: the tensors of a compressed download, from which the next ones step."""


@dataclass(frozen=True)
class ClientMemory:
    """A client's memory, by kind, as of the last round that the server has acknowledged.

    ``lost``: the client no longer has its memory of the acknowledged round.
    """

    kept: Mapping[str, Kept] = field(default_factory=dict)
    lost: bool = False

    @property
    def tensors(self) -> Groups:
        """The tensors by kind."""
        return {kind: each.tensors for kind, each in self.kept.items()}

    @classmethod
    def recall(
        cls, assignment: Assignment, directory: Path, required: Collection[str]
    ) -> "ClientMemory":
        """The memory that a round starts from; empty before the first acknowledged round.

        Args:
            required: kinds that the round needs, with the names and shapes of the adapter. If one
                of them is missing or damaged, the memory is lost.
        """
        acknowledged, store = assignment.acknowledged.round, RoundStore(directory)
        if not acknowledged or not (required or acknowledged in store.rounds()):
            return cls()
        kept = store.load(acknowledged)
        try:
            if kept is None:
                raise FederationError("its file cannot be used")
            for kind in sorted(required):
                check_like(kept.get(kind, Kept({})).tensors, assignment.params)
        except FederationError as error:
            logger.warning(
                "round %d starts from the global adapter: the memory of round %d is lost: %s",
                *(assignment.round, acknowledged, error),
            )
            return cls(lost=bool(required))
        return cls(kept)

    @staticmethod
    def keep(assignment: Assignment, directory: Path, kept: Mapping[str, Kept]) -> None:
        """Store the memory that the next round starts from if the server acknowledges this one.

        Raises:
            FederationError: the file cannot be written.
        """
        if (download := assignment.download) is not None:
            kept = {**kept, RECEIVED: Kept(download.whole or {})}
        if kept:
            acknowledged, oldest = assignment.acknowledged.round, assignment.oldest_checkpoint
            RoundStore(directory).store(assignment.round, kept, acknowledged, oldest)
