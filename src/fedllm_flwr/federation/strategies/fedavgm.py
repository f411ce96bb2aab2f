"""FedAvgM: federated averaging with server momentum.

Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", https://arxiv.org/abs/1909.06335
"""

from fedllm_flwr.federation.moments import Moments, moving_average
from fedllm_flwr.federation.strategies.base import FederatedStrategy
from fedllm_flwr.params import Params, add


class FedAvgM(FederatedStrategy):
    """m <- beta1 m + D, w <- w + eta m, with m_-1 = 0 and D = sum_i p_i D_i as in FedAvg.

    Hyper-parameters: ``algorithm.beta1`` (0.9; 0 is FedAvg), ``algorithm.eta`` (1).

    The ``openfedllm`` variant damps: m <- beta1 m + (1 - beta1) D, the first m being D.
    """

    def server_step(
        self, params: Params, delta: Params, moments: Moments
    ) -> tuple[Params, Moments]:
        """w + eta m, and m."""
        beta1, previous = self.algorithm.beta1, moments.get("m")
        if self.as_openfedllm:
            momentum = moving_average(previous, delta, beta1, undamped_start=True)
        elif previous is None:
            momentum = delta
        else:
            momentum = {name: beta1 * previous[name] + delta[name] for name in delta}
        return add(params, momentum, self.algorithm.eta), {"m": momentum}
