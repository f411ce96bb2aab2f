"""FedSA-LoRA: A is aggregated, B stays at the client.

Guo et al. 2025, "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
https://arxiv.org/abs/2410.01463
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from fedllm_flwr.factors import is_a, is_b
from fedllm_flwr.federation.algorithms.fedavg import FedAvg
from fedllm_flwr.federation.rule import Aftermath, Weighting
from fedllm_flwr.params import Groups, Params
from fedllm_flwr.training.local_terms import LocalResult, LocalTerms


@dataclass(frozen=True, kw_only=True)
class FedSA(FedAvg):
    """Clients train A_i and B_i; A <- A + eta sum_i p_i (A_i - A), and B_i stays with client i.

    A client's adapter is B_i A: the current A, and its own B from the last round in which it took
    part. B starts at zero. The global adapter has B = 0, so it does not change the base model by
    itself. A client that has lost its B starts from zero again.
    """

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples"}
    takes_factors: ClassVar[frozenset[str]] = frozenset({"both"})
    remembers: ClassVar[frozenset[str]] = frozenset({"adapter"})
    personal: ClassVar[str | None] = "adapter"

    def shares(self, name: str, round: int) -> bool:
        """Only A is sent back."""
        return is_a(name)

    def is_fixed(self, name: str) -> bool:
        """B, which is zero in the global adapter."""
        return is_b(name)

    def local_terms(self, received: Groups, memory: Groups) -> LocalTerms:
        """Start from the received A and the client's own B."""
        return replace(super().local_terms(received, memory), start=_own(received, memory))

    def finish(
        self,
        result: LocalResult,
        received: Groups,
        memory: Groups,
        as_received: Callable[[Params], Params],
    ) -> Aftermath:
        """Keep B_i, together with A_i."""
        return Aftermath(memory={"adapter": result.params})

    def personal_adapter(self, received: Groups, memory: Groups) -> Params | None:
        """B_i and the received A."""
        return _own(received, memory) if "adapter" in memory else None


def _own(received: Groups, memory: Groups) -> Params:
    own = memory.get("adapter", received["params"])
    return {n: own[n] if is_b(n) else value for n, value in received["params"].items()}
