"""Baselines to compare a federation with: local and centralised training."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.algorithms.fedavg import FedAvg
from fedllm_flwr.federation.rule import Aftermath, Counts, Rule
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Groups, Params
from fedllm_flwr.training.local_terms import LocalResult, LocalTerms


@dataclass(frozen=True, kw_only=True)
class Local(Rule):
    """Every client trains and keeps its own adapter; nothing is aggregated and w does not change.

    With ``algorithm.participation=all``, which ``algorithm=local`` sets, every client trains in
    every round and follows the whole learning-rate schedule. With ``sampled``, a client trains only
    in the rounds in which the federation would have sampled it, at the learning rates of those
    rounds. All clients start from the same w; a client's update is its adapter minus w.
    """

    remembers: ClassVar[frozenset[str]] = frozenset({"adapter"})
    personal: ClassVar[str | None] = "adapter"
    aggregates: ClassVar[bool] = False

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """Leave w unchanged."""
        return state

    def local_terms(self, received: Groups, memory: Groups) -> LocalTerms:
        """Start from the client's own adapter, or from w in its first round."""
        terms = super().local_terms(received, memory)
        return replace(terms, start=memory.get("adapter", received["params"]))

    def finish(
        self,
        result: LocalResult,
        received: Groups,
        memory: Groups,
        as_received: Callable[[Params], Params],
    ) -> Aftermath:
        """Keep the client's adapter."""
        return Aftermath(memory={"adapter": result.params})


@dataclass(frozen=True, kw_only=True)
class Centralized(FedAvg):
    """Centralised training, as FedAvg over one client that holds all the data."""

    def start(self, state: ServerState, num_clients: int) -> ServerState:
        """Require a single client.

        Raises:
            FederationError: there is more than one client.
        """
        if num_clients != 1:
            raise FederationError(
                f"algorithm=centralized takes one client that holds all the data, got "
                f"{num_clients}; set federation.num_clients=1 and partition=iid."
            )
        return super().start(state, num_clients)
