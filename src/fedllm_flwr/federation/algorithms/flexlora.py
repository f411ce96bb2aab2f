"""FlexLoRA: the mean of the products, truncated to each client's rank.

Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources", https://arxiv.org/abs/2402.11505; the weights of raFLoRA are those of Wu et al.
2026, "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity",
https://arxiv.org/abs/2602.13486
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedllm_flwr.factors import Weight, rank_of, stacked, truncated
from fedllm_flwr.federation.rule import Counts, Rule, Weighting
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Groups


@dataclass(frozen=True, kw_only=True)
class FlexLoRA(Rule):
    """B A <- the best rank-r approximation of sum_i p_i B_i A_i; client i gets the rank-r_i one.

    The singular values are sorted, so the first r_i columns of B = U S and rows of A = V' are the
    best rank-r_i approximation.

    Args:
        by_rank: use raFLoRA's weights. Column j of B_i gets p_i / sum(p_k of the clients with a
            rank above j) instead of p_i. Otherwise clients of lower rank shrink the components that
            only a few clients have, and these vanish over the rounds.
    """

    by_rank: bool = False

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples"}
    stacks: ClassVar[bool] = True
    any_rank: ClassVar[bool] = True

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """B A of rank r.

        If the mean has a lower rank, the unused rows of A are filled from the previous A, with
        B = 0, as at initialisation. If both were zero, no client could train them again.
        """
        weights: list[Weight] = list(counts.shares)
        if self.by_rank:
            ranks = [rank_of(adapter) for adapter in counts.adapters]
            above = np.arange(max(ranks)) < np.array(ranks)[:, None]  # (clients, columns)
            held = np.array(counts.shares) @ above
            weights = [p / held[:rank] for p, rank in zip(counts.shares, ranks, strict=True)]
        mean = stacked([*counts.adapters, state.params], [*weights, 0.0])
        return replace(state, params=truncated(mean, rank_of(state.params), exactly=True))
