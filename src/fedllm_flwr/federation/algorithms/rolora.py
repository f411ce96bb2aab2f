"""RoLoRA: B and A are trained in alternate rounds.

Chen et al. 2025, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
https://arxiv.org/abs/2502.01755
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedllm_flwr.federation.algorithms.fedavg import FedAvg
from fedllm_flwr.federation.rule import Factors, Weighting


@dataclass(frozen=True, kw_only=True)
class RoLoRA(FedAvg):
    """B <- B + eta sum_i p_i (B_i - B) in odd rounds, and the same for A in even ones.

    In each round one factor is the same at all clients, so averaging the other factor averages the
    products. Clients send back only the trained factor. The server sends both, because a client
    may have missed the previous round.
    """

    factors: Factors = "alternate"

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples"}
    takes_factors: ClassVar[frozenset[str]] = frozenset({"alternate"})
