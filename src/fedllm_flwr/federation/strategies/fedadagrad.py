"""FedAdagrad: adaptive server steps with an ever-growing second moment.

Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2,
https://arxiv.org/abs/2003.00295
"""

from fedllm_flwr.federation.strategies.fedopt import FedOpt
from fedllm_flwr.params import Array


class FedAdagrad(FedOpt):
    """v_t = v_t-1 + D_t^2; m, w, v_-1 and the hyper-parameters as in `FedOpt`.

    ``algorithm.beta1`` is 0 by default: m_t = D_t. In the ``openfedllm`` variant it always is.
    """

    @property
    def beta1(self) -> float:
        """Decay of the first moment."""
        return 0.0 if self.as_openfedllm else self.algorithm.beta1

    def second_moment(self, v: Array, square: Array) -> Array:
        """v + D^2."""
        return v + square
