"""FFA-LoRA: A is frozen, B is averaged.

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
    """B <- B + eta sum_i p_i (B_i - B); A keeps its initial value, drawn from the run's seed.

    All clients have the same A, so averaging the B_i averages the products:
    sum_i p_i B_i A = (sum_i p_i B_i) A. Only B is trained and sent, in both directions. Clients
    draw A themselves, unless ``init_adapter`` provides another one.

    ``algorithm.factors=b`` gives FedProx and the server optimizers the same frozen A.
    """

    factors: Factors = "b"

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples"}
    takes_factors: ClassVar[frozenset[str]] = frozenset({"b"})
