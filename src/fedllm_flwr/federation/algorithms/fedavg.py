"""Federated averaging.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
https://arxiv.org/abs/1602.05629
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from fedllm_flwr.federation.rule import Counts, Rule
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Groups, moved


@dataclass(frozen=True, kw_only=True)
class FedAvg(Rule):
    """w <- w + eta sum_i p_i D_i with p_i = n_i / sum_j n_j and D_i = w_i - w.

    Args:
        eta: server learning rate; 1 gives the paper's average.

    n_i is the paper's n_k: the number of training examples that client i holds, as announced at
    the start of the run, even if ``training.max_steps`` limits a round to fewer of them.
    ``algorithm.weighting=used`` counts the distinct examples of the round instead.
    """

    eta: float = 1.0

    takes_factors: ClassVar[frozenset[str]] = frozenset({"both", "b", "alternate"})

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """w + eta D."""
        return replace(state, params=moved(state.params, combined["delta"], self.eta))
