"""FedDyn: dynamic regularisation of the clients' objectives.

Acar et al. 2021, "Federated Learning Based on Dynamic Regularization", Algorithm 1,
https://arxiv.org/abs/2111.04263
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.federation.rule import Aftermath, Counts, Rule, Weighting
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Groups, Params, add
from fedllm_flwr.training.local_terms import LocalResult, LocalTerms


@dataclass(frozen=True, kw_only=True)
class FedDyn(Rule):
    """Clients minimise F_i(w_i) - <g_i, w_i> + alpha/2 ||w_i - w||^2.

    g_i <- g_i - alpha (w_i - w), h <- h - alpha/N sum_i(w_i - w), w <- mean_i(w_i) - h / alpha,
    with g_i and h zero at the start. N counts all clients, the mean is over those that replied.

    Args:
        alpha: weight of the regulariser, > 0. The authors' code divides it by the client's share of
            the data; here, as in the listing, it is the same for all.
    """

    alpha: float = 0.1

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "uniform", "openfedllm": "uniform"}
    remembers: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ConfigError(f"algorithm.options.alpha must be > 0, got {self.alpha}.")

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """w + D - h / alpha, and h."""
        delta = combined["delta"]
        share = self.alpha * counts.replied / counts.clients
        previous = state.tensors.get("h") or {n: np.zeros_like(value) for n, value in delta.items()}
        h = {name: previous[name] - share * delta[name] for name in delta}
        move = {name: delta[name] - h[name] / self.alpha for name in delta}
        return replace(state, params=add(state.params, move), tensors={"h": h})

    def local_terms(self, received: Groups, memory: Groups) -> LocalTerms:
        """alpha (w_i - w) - g_i for every step."""
        terms = replace(super().local_terms(received, memory), mu=self.alpha)
        if "gradient" not in memory:
            return terms
        return replace(terms, offset={n: -value for n, value in memory["gradient"].items()})

    def finish(
        self,
        result: LocalResult,
        received: Groups,
        memory: Groups,
        as_received: Callable[[Params], Params],
    ) -> Aftermath:
        """g_i, to keep."""
        zero = {name: np.zeros_like(value) for name, value in result.delta.items()}
        gradient = add(memory.get("gradient", zero), result.delta, -self.alpha)
        return Aftermath(memory={"gradient": gradient})
