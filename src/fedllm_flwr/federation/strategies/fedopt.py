"""The mechanics that FedAdagrad, FedYogi and FedAdam share.

Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2,
https://arxiv.org/abs/2003.00295
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from fedllm_flwr.federation.moments import Moments, moving_average
from fedllm_flwr.federation.strategies.base import FederatedStrategy
from fedllm_flwr.params import Array, Params, add, full_like


class FedOpt(FederatedStrategy):
    """m_t = beta1 m_t-1 + (1 - beta1) D_t, w_t+1 = w_t + eta m_t / (sqrt(v_t) + tau).

    m_-1 = 0 and v_-1 = tau^2; a subclass states how v_t follows from v_t-1 and D_t^2. There is no
    bias correction. The listing averages D over clients alike, with the remark that weights are
    easily added; here it is weighted by n_i, as in FedAvg (``algorithm.weighting=uniform`` for
    the listing).

    Hyper-parameters: ``algorithm.eta`` (1e-3), ``algorithm.tau`` (1e-3, the degree of
    adaptivity), ``algorithm.beta1`` and, but for FedAdagrad, ``algorithm.beta2``.

    The ``openfedllm`` variant feeds v with m_t^2 instead of D_t^2, starts with m_0 = D_0
    undamped, and averages D over clients alike.
    """

    default_weighting: ClassVar[Mapping[str, str]] = {"paper": "examples", "openfedllm": "uniform"}

    @property
    def beta1(self) -> float:
        """Decay of the first moment."""
        return self.algorithm.beta1

    @abstractmethod
    def second_moment(self, v: Array, square: Array) -> Array:
        """v_t from v_t-1 = `v` and `square` = D_t^2, element by element."""

    def server_step(
        self, params: Params, delta: Params, moments: Moments
    ) -> tuple[Params, Moments]:
        """w_t+1, and m_t and v_t."""
        tau = self.algorithm.tau
        m = moving_average(moments.get("m"), delta, self.beta1, undamped_start=self.as_openfedllm)
        previous = moments.get("v") or full_like(delta, tau**2)
        source = m if self.as_openfedllm else delta
        v = {name: self.second_moment(previous[name], np.square(source[name])) for name in previous}
        direction = {name: m[name] / (np.sqrt(v[name]) + tau) for name in m}
        return add(params, direction, self.algorithm.eta), {"m": m, "v": v}
