"""SCAFFOLD: control variates against client drift.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
Algorithm 1, https://arxiv.org/abs/1910.06378
"""

from collections.abc import Mapping
from typing import ClassVar

from fedllm_flwr.federation.strategies.fedavg import FedAvg
from fedllm_flwr.training.local_terms import LocalCorrection


class Scaffold(FedAvg):
    """Clients step along g + c - c_i; w <- w + eta mean_i(D_i), c <- c + sum_i(dc_i) / N.

    c is the server's control variate (zero at the start), c_i client i's, kept on its own disk,
    dc_i = c_i+ - c_i. N counts all clients, sampled or not; the mean is over those that
    replied, all alike.

    c is the mean of the c_i that the server has accepted. A client starts from the c_i of the round
    that the server acknowledges, so a reply that is lost, late or refused changes neither. A client
    that has lost its c_i starts from zero and says so; its old share is taken out of c.

    c_i+ = c_i - c + (w - w_i) / (K lr) (option II), which under SGD is the mean raw gradient over
    the K local steps; under AdamW, where w - w_i is no sum of gradients, clients take that mean.

    Hyper-parameter: ``algorithm.eta``, the paper's eta_g (1).

    In the ``openfedllm`` variant clients correct after each optimizer step, w_i -= lr (c - c_i),
    take option II whatever the optimizer, and D is weighted by n_i.
    """

    default_weighting: ClassVar[Mapping[str, str]] = {"paper": "uniform", "openfedllm": "examples"}

    def local_correction(self) -> LocalCorrection:
        """Control variates, and the proximal term if there is one."""
        return LocalCorrection(
            mu=self.algorithm.mu, control_variates=True, as_openfedllm=self.as_openfedllm
        )
