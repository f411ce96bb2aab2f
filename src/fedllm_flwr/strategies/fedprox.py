"""FedProx: federated averaging with a proximal term in the clients' loss.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks",
https://arxiv.org/abs/1812.06127
"""

from fedllm_flwr.strategies.fedavg import FedAvg


class FedProx(FedAvg):
    """Clients minimise F_i(w_i) + mu/2 ||w_i - w||^2, mu = ``algorithm.mu``; server as FedAvg.

    The term reaches the clients through `FederatedStrategy.local_correction`, which sends
    ``algorithm.mu`` for every algorithm: mu = 0 is FedAvg.
    """
