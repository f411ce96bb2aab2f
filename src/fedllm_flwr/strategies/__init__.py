"""Federated algorithms as Flower strategies: one file each, the mechanics in ``base``."""

from fedllm_flwr.strategies.base import FederatedStrategy
from fedllm_flwr.strategies.fedavg import FedAvg
from fedllm_flwr.strategies.fedprox import FedProx

STRATEGIES: dict[str, type[FederatedStrategy]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
}
