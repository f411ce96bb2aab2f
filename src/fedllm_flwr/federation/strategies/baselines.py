"""The two baselines that a federation is compared with: every client alone, and no federation."""

from pathlib import Path

from fedllm_flwr.config import Config
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.exchange import Roster
from fedllm_flwr.federation.moments import Moments
from fedllm_flwr.federation.report import Hooks
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.federation.strategies.base import FederatedStrategy
from fedllm_flwr.federation.strategies.fedavg import FedAvg
from fedllm_flwr.params import Params


class Local(FederatedStrategy):
    """w stays: every client trains its own adapter, which it keeps, and nothing is aggregated.

    With ``algorithm.participation=all``, as ``algorithm=local`` sets it, every client trains in
    every round, on the learning rates of the whole run; with ``sampled`` in those rounds in which
    the federation would have chosen it, on the learning rates of those rounds. All start from the
    same w; what a client sends is the way its adapter has come from it.
    """

    clients_alone = True

    def server_step(
        self, params: Params, delta: Params, moments: Moments
    ) -> tuple[Params, Moments]:
        """w."""
        return params, moments


class Centralized(FedAvg):
    """One client that holds all the data: FedAvg over it is training without a federation."""

    def __init__(
        self,
        config: Config,
        roster: Roster,
        state: ServerState,
        hooks: Hooks | None = None,
        known_clients: Path | None = None,
    ) -> None:
        if len(roster) != 1:
            raise FederationError(
                f"algorithm=centralized takes one client that holds all the data, got "
                f"{len(roster)}; set federation.num_clients=1 and partition=iid."
            )
        super().__init__(config, roster, state, hooks, known_clients)
