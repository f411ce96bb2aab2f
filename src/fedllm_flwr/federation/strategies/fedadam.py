"""FedAdam: adaptive server steps whose second moment is an exponential moving average.

Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2,
https://arxiv.org/abs/2003.00295
"""

from typing import cast

from fedllm_flwr.federation.strategies.fedopt import FedOpt
from fedllm_flwr.params import Array


class FedAdam(FedOpt):
    """v_t = beta2 v_t-1 + (1 - beta2) D_t^2, without bias correction; the rest as in `FedOpt`.

    ``algorithm.beta1`` 0.9, ``algorithm.beta2`` 0.99.
    """

    def second_moment(self, v: Array, square: Array) -> Array:
        """beta2 v + (1 - beta2) D^2."""
        beta2 = self.algorithm.beta2
        return cast(Array, beta2 * v + (1.0 - beta2) * square)
