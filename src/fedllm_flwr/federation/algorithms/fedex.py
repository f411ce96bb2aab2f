"""FedEx-LoRA: the residual between the mean of the products and the product of the means is kept.

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

    In the paper, every client adds s (sum_i p_i B_i A_i - B A) to its base weights in every round.
    Here F is kept apart from the base weights, as frozen factors with the adapter's scale s, so
    that a base model quantized to 8 or 4 bits does not change. The exported adapter contains F, and
    ``fedllm merge`` folds it into a full-precision base model.

    Args:
        max_rank: largest rank of F. The aggregate is exact as long as F fits this rank; after that,
            F is its best approximation of this rank.
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
                "algorithm=fedavg to drop the residual."
            )

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """Average A and B, and add the residual to F."""
        before = state.tensors.get(FROZEN, {})
        state = super().step(state, combined, counts)
        weights = [1.0, *counts.shares, -1.0]
        exact = stacked([before, *counts.adapters, state.params], weights)
        return replace(state, tensors={**state.tensors, FROZEN: truncated(exact, self.max_rank)})
