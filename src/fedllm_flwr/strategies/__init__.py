"""Federated algorithms as Flower strategies: one file each, the mechanics in ``base``."""

from fedllm_flwr.strategies.base import FederatedStrategy
from fedllm_flwr.strategies.baselines import Centralized, Local
from fedllm_flwr.strategies.fedadagrad import FedAdagrad
from fedllm_flwr.strategies.fedadam import FedAdam
from fedllm_flwr.strategies.fedavg import FedAvg
from fedllm_flwr.strategies.fedavgm import FedAvgM
from fedllm_flwr.strategies.fedprox import FedProx
from fedllm_flwr.strategies.fedyogi import FedYogi
from fedllm_flwr.strategies.report import Hooks, RoundReport
from fedllm_flwr.strategies.scaffold import Scaffold

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
