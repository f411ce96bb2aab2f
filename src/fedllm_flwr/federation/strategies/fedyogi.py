"""FedYogi: adaptive server steps whose second moment moves by steps of bounded size.

Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2,
https://arxiv.org/abs/2003.00295
"""

from typing import cast

import numpy as np

from fedllm_flwr.federation.strategies.fedopt import FedOpt
from fedllm_flwr.params import Array


class FedYogi(FedOpt):
    """v_t = v_t-1 - (1 - beta2) D_t^2 sign(v_t-1 - D_t^2); the rest as in `FedOpt`.

    ``algorithm.beta1`` 0.9, ``algorithm.beta2`` 0.99.
    """

    def second_moment(self, v: Array, square: Array) -> Array:
        """v - (1 - beta2) D^2 sign(v - D^2)."""
        return cast(Array, v - (1.0 - self.algorithm.beta2) * square * np.sign(v - square))
