"""Federated averaging.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
https://arxiv.org/abs/1602.05629
"""

from fedllm_flwr.federation.moments import Moments
from fedllm_flwr.federation.strategies.base import FederatedStrategy
from fedllm_flwr.params import Params, add


class FedAvg(FederatedStrategy):
    """w <- w + eta sum_i p_i D_i with p_i = n_i / sum_j n_j and D_i = w_i - w.

    Hyper-parameter: ``algorithm.eta`` (1: the paper's average).

    n_i is the paper's n_k, the number of training examples that client i holds and announced at
    the start of the run, however few of them a round of ``training.max_steps`` uses.
    ``algorithm.weighting=used`` counts the distinct examples of the round instead.
    """

    def server_step(
        self, params: Params, delta: Params, moments: Moments
    ) -> tuple[Params, Moments]:
        """w + eta D."""
        return add(params, delta, self.algorithm.eta), moments
