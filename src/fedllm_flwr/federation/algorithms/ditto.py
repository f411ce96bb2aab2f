"""Ditto: a personal adapter that is pulled towards the global one, trained beside it.

Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization",
https://arxiv.org/abs/2012.04221
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.federation.algorithms.fedavg import FedAvg
from fedllm_flwr.federation.rule import Weighting
from fedllm_flwr.params import Groups
from fedllm_flwr.training.local_terms import LocalTerms


@dataclass(frozen=True, kw_only=True)
class Ditto(FedAvg):
    """w as in FedAvg; v_i <- v_i - lr (grad F_i(v_i) + pull (v_i - w)), from round to round.

    w is the global adapter that the client has been sent. v_i starts at the first w that the client
    gets, stays at the client, and is trained on the same examples as w_i, as many steps; a round
    takes twice the computation. A client that has lost v_i starts again from w.

    Args:
        pull: lambda, > 0. It is added after clipping, as FedProx's term is.
    """

    pull: float = 0.1

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples"}
    takes_factors: ClassVar[frozenset[str]] = frozenset({"both"})
    remembers: ClassVar[frozenset[str]] = frozenset({"personal"})
    personal: ClassVar[str | None] = "personal"

    def __post_init__(self) -> None:
        if not self.pull > 0:
            raise ConfigError(
                f"algorithm.options.pull must be > 0, got {self.pull}; use algorithm=local for "
                "adapters that nothing pulls together."
            )

    def personal_terms(self, received: Groups, memory: Groups) -> LocalTerms:
        """From v_i, pulled towards w."""
        w = received["params"]
        return LocalTerms(memory.get("personal", w), mu=self.pull, anchor=w)
