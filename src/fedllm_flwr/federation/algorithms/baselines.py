"""The baselines that a federation is compared with: local training, and no federation."""

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
    """w stays: every client trains its own adapter, which it keeps, and nothing is aggregated.

    With ``algorithm.participation=all``, as ``algorithm=local`` sets it, every client trains in
    every round, on the learning rates of the whole run; with ``sampled`` in those rounds in which
    the federation would have chosen it, on the learning rates of those rounds. All start from the
    same w; what a client sends is the way its adapter has come from it.
    """

    remembers: ClassVar[frozenset[str]] = frozenset({"adapter"})
    personal: ClassVar[str | None] = "adapter"
    aggregates: ClassVar[bool] = False

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """w."""
        return state

    def local_terms(self, received: Groups, memory: Groups) -> LocalTerms:
        """From the client's own adapter, where it has one."""
        terms = super().local_terms(received, memory)
        return replace(terms, start=memory.get("adapter", received["params"]))

    def finish(
        self,
        result: LocalResult,
        received: Groups,
        memory: Groups,
        as_received: Callable[[Params], Params],
    ) -> Aftermath:
        """The client's adapter, to keep."""
        return Aftermath(memory={"adapter": result.params})


@dataclass(frozen=True, kw_only=True)
class Centralized(FedAvg):
    """One client that holds all the data: FedAvg over it is training without a federation."""

    def start(self, state: ServerState, num_clients: int) -> ServerState:
        """`state`.

        Raises:
            FederationError: there is more than one client.
        """
        if num_clients != 1:
            raise FederationError(
                f"algorithm=centralized takes one client that holds all the data, got "
                f"{num_clients}; set federation.num_clients=1 and partition=iid."
            )
        return super().start(state, num_clients)
