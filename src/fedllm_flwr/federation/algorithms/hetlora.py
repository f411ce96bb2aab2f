"""HetLoRA: adapters of different ranks, padded with zeros and weighted by their norms.

Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
https://arxiv.org/abs/2401.06432
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedllm_flwr.factors import module_norms, padded, pairs, rank_of
from fedllm_flwr.federation.rule import Counts, Rule, Weighting
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Groups


@dataclass(frozen=True, kw_only=True)
class HetLoRA(Rule):
    """A <- sum_i q_i pad(A_i), B <- sum_i q_i pad(B_i) with q_i = ||B_i A_i|| / sum_j ||B_j A_j||.

    pad fills up with zeros to rank r; client i gets the first r_i rows of A and columns of B. The
    weights q_i are those of a module, by the Frobenius norm of its product (the paper's sparsity
    weights). The paper's self-pruning of ranks is not carried out: a client keeps its rank.
    """

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples"}
    stacks: ClassVar[bool] = True
    any_rank: ClassVar[bool] = True

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """A and B."""
        rank = rank_of(state.params)
        norms = [module_norms(adapter) for adapter in counts.adapters]
        adapters = [padded(adapter, rank) for adapter in counts.adapters]
        params = {}
        for names in pairs(state.params):
            q = np.sqrt([squares[names[0]] for squares in norms])
            q = q / q.sum() if q.sum() else np.full(len(q), 1 / len(q))
            for name in names:
                terms = [w * a[name].astype(np.float64) for w, a in zip(q, adapters, strict=True)]
                params[name] = np.sum(terms, axis=0)
        return replace(state, params=params)
