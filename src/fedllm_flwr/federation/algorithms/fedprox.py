"""FedProx: federated averaging with a proximal term in the clients' loss.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks",
https://arxiv.org/abs/1812.06127
"""

from dataclasses import dataclass

from fedllm_flwr.federation.algorithms.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """Clients minimise F_i(w_i) + mu/2 ||w_i - w||^2; the server averages as FedAvg.

    Args:
        mu: >= 0; 0 is FedAvg. The paper does not clip; with ``training.max_grad_norm``, the term is
            added after clipping, so that the pull towards w stays mu ||w_i - w|| however far a
            client has gone. In the ``openfedllm`` variant it is a part of the loss and clipped
            with it.

    Every rule takes ``mu``, so that any algorithm can be combined with the proximal term.
    """

    mu: float = 0.01
