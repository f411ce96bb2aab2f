"""Federated algorithms as Flower strategies: one file each, the mechanics in ``base``."""

from fedllm_flwr.federation.report import Hooks, RoundReport
from fedllm_flwr.federation.strategies.base import FederatedStrategy
from fedllm_flwr.federation.strategies.baselines import Centralized, Local
from fedllm_flwr.federation.strategies.fedadagrad import FedAdagrad
from fedllm_flwr.federation.strategies.fedadam import FedAdam
from fedllm_flwr.federation.strategies.fedavg import FedAvg
from fedllm_flwr.federation.strategies.fedavgm import FedAvgM
from fedllm_flwr.federation.strategies.fedprox import FedProx
from fedllm_flwr.federation.strategies.fedyogi import FedYogi
from fedllm_flwr.federation.strategies.scaffold import Scaffold

__all__ = ["STRATEGIES", "FederatedStrategy", "Hooks", "RoundReport"]

STRATEGIES: dict[str, type[FederatedStrategy]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedyogi": FedYogi,
    "fedadam": FedAdam,
    "local": Local,
    "centralized": Centralized,
}
