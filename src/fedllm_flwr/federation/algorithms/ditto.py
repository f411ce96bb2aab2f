"""Ditto: each client also trains a personal adapter that is pulled towards the global one.

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
    """w as in FedAvg; personal v_i <- v_i - lr (grad F_i(v_i) + pull (v_i - w)).

    w is the global adapter that the client received in this round. v_i starts from the first w that
    the client receives, never leaves the client, and is trained on the same examples and for the
    same number of steps as w_i, which doubles the computation of a round. A client that has lost
    v_i starts again from w.

    Args:
        pull: lambda, > 0. Its term is added after gradient clipping, as FedProx's is.
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
                "independent local adapters."
            )

    def personal_terms(self, received: Groups, memory: Groups) -> LocalTerms:
        """Train from v_i, pulled towards w."""
        w = received["params"]
        return LocalTerms(memory.get("personal", w), mu=self.pull, anchor=w)
