"""FedAdam: adaptive server steps with an exponential average of squares.

Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2,
https://arxiv.org/abs/2003.00295
"""

from dataclasses import dataclass

from fedllm_flwr.federation.algorithms.fedopt import FedOpt
from fedllm_flwr.params import Array


@dataclass(frozen=True, kw_only=True)
class FedAdam(FedOpt):
    """v_t = beta2 v_t-1 + (1 - beta2) D_t^2; the rest as in `FedOpt`.

    Args:
        beta2: decay of the second moment.
    """

    beta2: float = 0.99

    def second_moment(self, v: Array, square: Array) -> Array:
        """beta2 v + (1 - beta2) D^2."""
        return self.beta2 * v + (1.0 - self.beta2) * square
