"""FedEx-LoRA: what the mean of A and B leaves of the mean of the products is kept beside them.

Singhal et al. 2025, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models", https://arxiv.org/abs/2410.09432
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.factors import stacked, truncated
from fedllm_flwr.federation.algorithms.fedavg import FedAvg
from fedllm_flwr.federation.messages import FROZEN
from fedllm_flwr.federation.rule import Counts, Weighting
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Groups


@dataclass(frozen=True, kw_only=True)
class FedEx(FedAvg):
    """A and B as in FedAvg, and F <- F + sum_i p_i B_i A_i - B A.

    The paper adds s (sum_i p_i B_i A_i - B A) to the base weights of all clients in every round.
    Here F stands beside them as frozen factors with the scale of the adapter, so that a base model
    in 8 or 4 bits stays as it is; the exported adapter holds them, and ``fedllm merge`` folds it
    into a base model in full precision.

    Args:
        max_rank: of F. The mean is exact until a round's residual needs more; from then on F is
            the best approximation of this rank.
    """

    max_rank: int = 64

    takes_factors: ClassVar[frozenset[str]] = frozenset({"both"})
    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples"}
    stacks: ClassVar[bool] = True
    freezes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.max_rank < 1:
            raise ConfigError(
                f"algorithm.options.max_rank must be >= 1, got {self.max_rank}; use "
                "algorithm=fedavg to keep no residual."
            )

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """A and B, and F."""
        before = state.tensors.get(FROZEN, {})
        state = super().step(state, combined, counts)
        weights = [1.0, *counts.shares, -1.0]
        exact = stacked([before, *counts.adapters, state.params], weights)
        return replace(state, tensors={**state.tensors, FROZEN: truncated(exact, self.max_rank)})
