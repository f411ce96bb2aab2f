"""Adaptive server optimizers: the common base of FedAdagrad, FedYogi and FedAdam.

Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2,
https://arxiv.org/abs/2003.00295
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedllm_flwr.federation.algorithms.moments import moving_average
from fedllm_flwr.federation.rule import Counts, Rule, Weighting
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Array, Groups, add


@dataclass(frozen=True, kw_only=True)
class FedOpt(Rule):
    """m_t = beta1 m_t-1 + (1 - beta1) D_t, w_t+1 = w_t + eta m_t / (sqrt(v_t) + tau).

    m_-1 = 0 and v_-1 = tau^2; a subclass defines v_t from v_t-1 and D_t^2. There is no bias
    correction. The paper's Algorithm 2 averages D uniformly over clients and remarks that weights
    are easily added. Here D is weighted by n_i, as in FedAvg; ``algorithm.weighting=uniform``
    follows the listing.

    Args:
        eta: server learning rate.
        tau: degree of adaptivity.
        beta1: decay of the first moment.

    The ``openfedllm`` variant computes v from m_t^2 instead of D_t^2, starts with m_0 = D_0
    undamped, and averages D uniformly over clients.
    """

    eta: float = 1e-3
    tau: float = 1e-3
    beta1: float = 0.9

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples", "openfedllm": "uniform"}

    takes_factors: ClassVar[frozenset[str]] = frozenset({"both", "b"})

    @abstractmethod
    def second_moment(self, v: Array, square: Array) -> Array:
        """v_t from v_t-1 = `v` and D_t^2 = `square`, elementwise."""

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """w_t+1, m_t and v_t."""
        delta, before = combined["delta"], state.tensors.get("v", {})
        m = moving_average(
            state.tensors.get("m"), delta, self.beta1, undamped_start=self.as_openfedllm
        )
        source = m if self.as_openfedllm else delta
        v, params = {}, dict(state.params)
        for name in delta:
            previous = before.get(name, np.asarray(self.tau**2))
            v[name] = self.second_moment(previous, np.square(source[name]))
            direction = m[name] / (np.sqrt(v[name]) + self.tau)
            params |= add({name: params[name]}, {name: direction}, self.eta)
        return replace(state, params=params, tensors={"m": m, "v": v})
