"""FFA-LoRA: A frozen, B averaged.

Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning",
https://arxiv.org/abs/2403.12313
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedllm_flwr.federation.algorithms.fedavg import FedAvg
from fedllm_flwr.federation.rule import Factors, Weighting


@dataclass(frozen=True, kw_only=True)
class FFA(FedAvg):
    """B <- B + eta sum_i p_i (B_i - B); A stays as it was drawn from the run's seed.

    All clients have the same A, so the mean of the B_i is the mean of the products:
    sum_i p_i B_i A = (sum_i p_i B_i) A. B alone is trained and travels, in both directions:
    clients draw A themselves, unless ``init_adapter`` brings another one.

    ``algorithm.factors=b`` does the same under FedProx and the server optimizers.
    """

    factors: Factors = "b"

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples"}
    takes_factors: ClassVar[frozenset[str]] = frozenset({"b"})
