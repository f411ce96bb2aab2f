"""FLoRA: stacked client factors.

Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", https://arxiv.org/abs/2409.05976
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.factors import is_a, stacked, truncated
from fedllm_flwr.federation.messages import FROZEN
from fedllm_flwr.federation.rule import Counts, Rule, Weighting
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Groups, Params, derive_seed, digest


@dataclass(frozen=True, kw_only=True)
class FLoRA(Rule):
    """F <- F + sum_i p_i B_i A_i, with the A_i stacked by rows and the p_i B_i by columns.

    A and B are initialised anew in every round. In the paper, clients add s times the stacked
    product to their base weights after every round. Here the sum over the rounds, F, is kept apart
    from the base weights, as frozen factors with the adapter's scale s: a client that has missed
    rounds receives all of F, and a base model quantized to 8 or 4 bits does not change. The
    exported adapter contains F, and ``fedllm merge`` folds it into a full-precision base model.

    Args:
        max_rank: largest rank of F. The sum is exact as long as it fits this rank; after that, F
            is its best approximation of this rank.
    """

    max_rank: int = 64

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples"}
    stacks: ClassVar[bool] = True
    any_rank: ClassVar[bool] = True
    freezes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.max_rank < 1:
            raise ConfigError(f"algorithm.options.max_rank must be >= 1, got {self.max_rank}.")

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """The new F, and freshly initialised A and B for the next round."""
        before = state.tensors.get(FROZEN, {})
        exact = stacked([before, *counts.adapters], [1.0, *counts.shares])
        frozen = truncated(exact, self.max_rank)
        return replace(
            state, params=_fresh(state.params), tensors={**state.tensors, FROZEN: frozen}
        )


def _fresh(params: Params) -> Params:
    """LoRA's initial value, seeded by the previous A: A uniform within 1 / sqrt(in), B = 0."""
    found = {}
    for name, value in params.items():
        if is_a(name):
            generator = np.random.default_rng(derive_seed("flora", name, digest({name: value})))
            bound = 1 / np.sqrt(value.shape[1])
            found[name] = generator.uniform(-bound, bound, value.shape).astype(np.float32)
        else:
            found[name] = np.zeros_like(value)
    return found
