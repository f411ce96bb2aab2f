"""Streaming, validated aggregation of one round's updates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fedllm_flwr.errors import FederationError
from fedllm_flwr.messages import Update
from fedllm_flwr.params import Params, RunningMean, check_like


@dataclass
class RoundReport:
    """What happened in one round, by client name."""

    round: int
    sampled: list[str]
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    num_examples: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def loss(self) -> float | None:
        """Mean local training loss, weighted by examples; None without a reply."""
        total = sum(self.num_examples[name] for name in self.metrics)
        if not total:
            return None
        weighted = (
            self.metrics[name]["loss"] * self.num_examples[name] for name in sorted(self.metrics)
        )
        return sum(weighted) / total


class Aggregator:
    """Adds valid updates to running sums and drops them; refuses the others by name."""

    def __init__(
        self,
        reference: Params,
        sizes: Mapping[str, int],
        weight_of: Callable[[str, Update], float],
        with_control: bool,
    ) -> None:
        self._reference = reference
        self._sizes = sizes
        self._weight_of = weight_of
        self._with_control = with_control
        self.delta = RunningMean()
        self.control_delta = RunningMean()

    def add(self, name: str, update: Update) -> None:
        """Validate one update and add it.

        Raises:
            FederationError: says what is wrong with the update.
        """
        if not 1 <= update.num_examples <= self._sizes[name]:
            raise FederationError(
                f"num_examples={update.num_examples} is not in 1..{self._sizes[name]}, the number "
                "it announced"
            )
        if "loss" not in update.metrics:
            raise FederationError("its metrics lack 'loss'")
        check_like(update.delta, self._reference)
        if self._with_control:
            if update.control_delta is None:
                raise FederationError("its control variate is missing")
            check_like(update.control_delta, self._reference)
            self.control_delta.add(update.control_delta, 1.0)
        self.delta.add(update.delta, self._weight_of(name, update))
