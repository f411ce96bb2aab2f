"""FedAvgM: federated averaging with server momentum.

Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", https://arxiv.org/abs/1909.06335
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from fedllm_flwr.federation.algorithms.moments import moving_average
from fedllm_flwr.federation.rule import Counts, Rule
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Groups, moved


@dataclass(frozen=True, kw_only=True)
class FedAvgM(Rule):
    """m <- beta1 m + D, w <- w + eta m, with m_-1 = 0 and D = sum_i p_i D_i as in FedAvg.

    Args:
        beta1: decay of the momentum; 0 gives FedAvg.
        eta: server learning rate.

    The ``openfedllm`` variant dampens the momentum: m <- beta1 m + (1 - beta1) D, and m_0 = D_0.
    """

    beta1: float = 0.9
    eta: float = 1.0

    takes_factors: ClassVar[frozenset[str]] = frozenset({"both", "b"})

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """w + eta m, and m."""
        delta, previous = combined["delta"], state.tensors.get("m")
        if self.as_openfedllm:
            momentum = moving_average(previous, delta, self.beta1, undamped_start=True)
        elif previous is None:
            momentum = delta
        else:
            momentum = {name: self.beta1 * previous[name] + delta[name] for name in delta}
        params = moved(state.params, momentum, self.eta)
        return replace(state, params=params, tensors={"m": momentum})
