"""Fed-SB: a small core R is averaged, between fixed B and A from the clients' first gradients.

Singhal et al. 2025, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance
in (Private) Federated LoRA Fine-Tuning", https://arxiv.org/abs/2502.15436; the adapter is LoRA-SB
of Ponkshe et al. 2025, https://arxiv.org/abs/2411.19557
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedllm_flwr.errors import ConfigError, FederationError
from fedllm_flwr.factors import core_of, is_a, is_b, is_core, pairs, rank_of
from fedllm_flwr.federation.algorithms.fedavg import FedAvg
from fedllm_flwr.federation.rule import Counts, Weighting
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.federation.updates.cast import round_trip
from fedllm_flwr.params import Groups
from fedllm_flwr.training.local_terms import LocalTerms


@dataclass(frozen=True, kw_only=True)
class FedSB(FedAvg):
    """W + s B R A: R <- R + eta sum_i p_i (R_i - R), R (r, r) from 0; B and A are fixed.

    All clients have the same B and A, so averaging the R_i averages the products. B and A are the
    first r singular vectors of G = sum_i p_i G_i, the mean gradient of W at the base model. They
    are computed by subspace iteration, so neither clients nor server ever form a G_i. In the first
    `estimation` rounds the model does not change; clients send the mean gradient of their steps,
    alternately

        of B at B = 0, which is s G A': B <- its orthonormal basis Q
        of A at A = 0, which is s Q' G = U S V': A <- V' and B <- Q U

    starting from the A of the seed. B and A are finally rounded to bfloat16, so that every wire
    dtype represents them exactly. The gradients are computed by the clients of these rounds on
    their training records. They have the size of the adapter, and are averaged, clipped, masked and
    noised like any update.

    Args:
        estimation: number of estimation rounds, which is even: an iteration takes two.

    The authors' code uses the gradient of pooled training records on one machine. Instead of G it
    decomposes the gradient's sign times a step size, and it initialises R with the singular values,
    which takes that step. Here R starts at 0, so that training starts from the base model.
    """

    estimation: int = 2

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples"}
    takes_factors: ClassVar[frozenset[str]] = frozenset({"both"})
    has_cores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.estimation < 2 or self.estimation % 2:
            raise ConfigError(
                "algorithm.options.estimation must be an even number of rounds above 0, got "
                f"{self.estimation}; use 2, or 4 for a second iteration."
            )

    def estimates(self, round: int) -> bool:
        """Whether a round estimates gradients: the first `estimation` rounds."""
        return round <= self.estimation

    def trains(self, name: str, round: int) -> bool:
        """R; during estimation, the factor whose gradient is sent."""
        if self.estimates(round):
            return is_b(name) if round % 2 else is_a(name)
        return is_core(name)

    def start(self, state: ServerState, num_clients: int) -> ServerState:
        """The state with R = I, while B or A is 0."""
        if any(map(is_core, state.params)):
            return state
        rank, cores = rank_of(state.params), {}
        for name_a, name_b in pairs(state.params):
            if rank > (least := min(state.params[name_a].shape[1], len(state.params[name_b]))):
                raise FederationError(
                    f"algorithm=fed_sb: {name_b} has {least} dimensions, fewer than lora.r={rank}"
                )
            if state.params[name_b].any():
                raise FederationError(
                    "algorithm=fed_sb starts from the base model; merge init_adapter into it first."
                )
            cores[core_of(name_b)] = np.eye(rank, dtype=np.float32)
        return replace(state, params={**state.params, **cores})

    def local_terms(self, received: Groups, memory: Groups) -> LocalTerms:
        """As in FedAvg, with the mean gradient."""
        return replace(super().local_terms(received, memory), averages_gradient=True)

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """Update R; during estimation, B or A."""
        number = state.round + 1
        if not self.estimates(number):
            return super().step(state, combined, counts)
        params, gradient = dict(state.params), combined["delta"]
        for name_a, name_b in pairs(name for name in params if not is_core(name)):
            if number % 2:
                params[name_b] = np.linalg.qr(gradient[name_b])[0]
                params[name_a] = np.zeros_like(params[name_a])
                continue
            u, _, params[name_a] = np.linalg.svd(gradient[name_a], full_matrices=False)
            if number < self.estimation:
                params[name_b] = np.zeros_like(params[name_b])
                continue
            params[name_b] = params[name_b].astype(np.float64) @ u
            params |= round_trip({name: params[name] for name in (name_a, name_b)}, "bfloat16")
            params[core_of(name_b)] = np.zeros_like(params[core_of(name_b)])
        return replace(state, params=params)
