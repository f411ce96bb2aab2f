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
        mu: >= 0; 0 gives FedAvg. The paper does not clip gradients. With
            ``training.max_grad_norm``, the gradient of the proximal term is added after clipping,
            so its norm is always mu ||w_i - w||. In the ``openfedllm`` variant the term is part of
            the loss and is clipped with it.

    Every rule has ``mu``, so the proximal term can be combined with any algorithm.
    """

    mu: float = 0.01
