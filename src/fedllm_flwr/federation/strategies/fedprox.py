"""FedProx: federated averaging with a proximal term in the clients' loss.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks",
https://arxiv.org/abs/1812.06127
"""

from fedllm_flwr.federation.strategies.fedavg import FedAvg


class FedProx(FedAvg):
    """Clients minimise F_i(w_i) + mu/2 ||w_i - w||^2; the server averages as FedAvg.

    Hyper-parameters: ``algorithm.mu`` >= 0 (0 is FedAvg), ``algorithm.eta`` (1). The paper
    does not clip; with ``training.max_grad_norm``, the term is added after clipping, so that the
    pull towards w stays mu ||w_i - w|| however far a client has gone. In the ``openfedllm`` variant
    it is a part of the loss and clipped with it.

    The term reaches the clients through `FederatedStrategy.local_correction`, which sends
    ``algorithm.mu`` for every algorithm, so that any of them can be combined with it.
    """
