"""HetLoRA: adapters of different ranks, zero-padded and weighted by their norms.

Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
https://arxiv.org/abs/2401.06432
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.factors import cut, kept_rank, module_norms, padded, pairs, rank_of, rest
from fedllm_flwr.federation.rule import Counts, Rule, Weighting
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Array, Groups
from fedllm_flwr.training.local_terms import LocalTerms


@dataclass(frozen=True, kw_only=True)
class HetLoRA(Rule):
    """A <- sum_i q_i pad(A_i), B <- sum_i q_i pad(B_i) with q_i = ||B_i A_i|| / sum_j ||B_j A_j||.

    pad adds zeros up to rank r; client i gets the first r_i rows of A and columns of B. The weights
    q_i are computed per module, from the Frobenius norm of its product (the paper's sparsity
    weights).

    Self-pruning: with k = gamma r_i, clients add lambda ||B[:, k:]|| ||A[k:, :]|| to their loss. If
    the sum of these norms over the modules decreases in a round, r_i <- k and the rest is
    discarded. The server decides this from the adapters that it sent and received, so no further
    communication is needed.

    Args:
        gamma: share of the rank that pruning keeps; 1 disables pruning.
        strength: lambda >= 0.
    """

    gamma: float = 1.0
    strength: float = 0.0

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples"}
    stacks: ClassVar[bool] = True
    any_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ConfigError(
                f"algorithm.options.gamma must be above 0 and at most 1, got {self.gamma}; use 1 "
                "to keep all ranks."
            )
        if self.strength < 0:
            raise ConfigError(f"algorithm.options.strength must be >= 0, got {self.strength}.")

    def rank(self, state: ServerState, client: str, rank: int) -> int:
        """The client's rank after pruning."""
        pruned = state.tensors.get("ranks", {}).get(client)
        return rank if pruned is None else min(rank, int(pruned[0]))

    def local_terms(self, received: Groups, memory: Groups) -> LocalTerms:
        """Add the pruning regulariser."""
        tail = (self.strength, self.gamma) if self.strength and self.gamma < 1 else None
        return replace(super().local_terms(received, memory), tail=tail)

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """Average A and B, and prune the ranks."""
        rank = rank_of(state.params)
        ranks = dict(state.tensors.get("ranks", {}))
        new_ranks = []
        for client, adapter in zip(counts.names, counts.adapters, strict=True):
            own = rank_of(adapter)
            kept = kept_rank(own, self.gamma)
            if kept < own and _tail(adapter, kept) < _tail(cut(state.params, own), kept):
                ranks[client] = np.array([kept], np.float64)
                own = kept
            new_ranks.append(own)
        params = {}
        for names in pairs(state.params):
            modules = [
                cut({name: adapter[name] for name in names}, own)
                for adapter, own in zip(counts.adapters, new_ranks, strict=True)
            ]
            q = np.sqrt([module_norms(module)[names[0]] for module in modules])
            q = q / q.sum() if q.sum() else np.full(len(q), 1 / len(q))
            modules = [padded(module, rank) for module in modules]
            for name in names:
                terms = [w * m[name].astype(np.float64) for w, m in zip(q, modules, strict=True)]
                params[name] = np.sum(terms, axis=0)
        tensors = {**state.tensors, **({"ranks": ranks} if ranks else {})}
        return replace(state, params=params, tensors=tensors)


def _tail(adapter: Mapping[str, Array], kept: int) -> float:
    """Sum over modules of ||B[:, k:]|| ||A[k:, :]||."""
    tail = rest(adapter, kept)
    sizes = {name: float(np.linalg.norm(v.astype(np.float64))) for name, v in tail.items()}
    return sum(sizes[a] * sizes[b] for a, b in pairs(tail))
