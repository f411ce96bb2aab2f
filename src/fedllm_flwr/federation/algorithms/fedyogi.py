"""FedYogi: adaptive server steps with a second moment that changes additively, by at most D_t^2.

Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2,
https://arxiv.org/abs/2003.00295
"""

from dataclasses import dataclass
from typing import cast

import numpy as np

from fedllm_flwr.federation.algorithms.fedopt import FedOpt
from fedllm_flwr.params import Array


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedOpt):
    """v_t = v_t-1 - (1 - beta2) D_t^2 sign(v_t-1 - D_t^2); the rest as in `FedOpt`.

    Args:
        beta2: decay of the second moment.
    """

    beta2: float = 0.99

    def second_moment(self, v: Array, square: Array) -> Array:
        """v - (1 - beta2) D^2 sign(v - D^2)."""
        return cast(Array, v - (1.0 - self.beta2) * square * np.sign(v - square))
