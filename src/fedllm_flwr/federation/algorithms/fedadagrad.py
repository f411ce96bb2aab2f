"""FedAdagrad: adaptive server steps with an accumulated second moment.

Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2,
https://arxiv.org/abs/2003.00295
"""

from dataclasses import dataclass, replace

from fedllm_flwr.federation.algorithms.fedopt import FedOpt
from fedllm_flwr.federation.rule import Counts
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Array, Groups


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(FedOpt):
    """v_t = v_t-1 + D_t^2; m, w, v_-1 and the hyper-parameters as in `FedOpt`.

    Args:
        beta1: 0 by default, so m_t = D_t; always 0 in the ``openfedllm`` variant.
    """

    beta1: float = 0.0

    def second_moment(self, v: Array, square: Array) -> Array:
        """v + D^2."""
        return v + square

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """As in `FedOpt`."""
        rule = replace(self, beta1=0.0) if self.as_openfedllm else self
        return super(FedAdagrad, rule).step(state, combined, counts)
