"""LoRA-FAIR: the server corrects the mean of B.

Bian et al. 2025, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
Refinement", https://arxiv.org/abs/2411.14961
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.factors import pairs, stacked
from fedllm_flwr.federation.algorithms.fedavg import FedAvg
from fedllm_flwr.federation.rule import Counts, Weighting
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Groups


@dataclass(frozen=True, kw_only=True)
class LoRAFair(FedAvg):
    """B <- B + argmin_dB ||(B + dB) A - sum_i p_i B_i A_i||^2 + strength ||dB||^2.

    A and B are FedAvg's means. With the residual R = sum_i p_i B_i A_i - B A, whose factors are
    known, dB = R A' (A A' + strength I)^-1. The adapter's scale s is left out: it multiplies both
    terms of the residual, and `strength` is defined for the unscaled products.

    Args:
        strength: lambda > 0, the weight of the regulariser.

    The paper uses a similarity measure and does not specify the solver; the squared Frobenius norm
    has this closed form.
    """

    strength: float = 0.01

    takes_factors: ClassVar[frozenset[str]] = frozenset({"both"})
    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples"}
    stacks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise ConfigError(
                f"algorithm.options.strength must be > 0, got {self.strength}; use "
                "algorithm=fedavg for no correction."
            )

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """The means A and B, with B corrected by dB."""
        state = super().step(state, combined, counts)
        params = dict(state.params)
        residual = stacked([*counts.adapters, params], [*counts.shares, -1.0])
        for name_a, name_b in pairs(params):
            a = params[name_a].astype(np.float64)
            gram = a @ a.T + self.strength * np.eye(len(a))
            right = residual[name_b] @ (residual[name_a] @ a.T)
            params[name_b] = params[name_b] + np.linalg.solve(gram, right.T).T
        return replace(state, params=params)
