"""What happened in a round, and who is told."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from fedllm_flwr.errors import DivergedError, FederationError
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Params


@dataclass
class RoundReport:
    """What happened in one round, by client name.

    ``metrics``, ``num_examples`` and ``failures`` are those of training; ``scores`` and
    ``score_failures`` those of the clients' evaluation of the new adapter, if there was one.
    ``ignored`` are replies and nodes that count for no client, such as a second one; ``lost`` names
    clients that have started anew, each with the round of which its memory is lost; ``cut`` is
    the share of each client's update that a robust combiner has left out. ``spent`` is epsilon and
    delta after the round, where privacy is promised; ``is_last``: another round would spend more
    than ``privacy.target_epsilon``. ``norms`` and ``cosines`` are those of the updates, see
    `directions.UpdateDirections`. ``adapter_with``, where updates are kept
    (``evaluation.contribution``), is the adapter that the round would have ended with if the
    updates of these clients alone had come.
    """

    round: int
    sampled: list[str]
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    num_examples: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)  # those of the failures that the server refused
    diverged: set[str] = field(default_factory=set)  # those of the failures with NaN or Inf
    lost: dict[str, int] = field(default_factory=dict)
    cut: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    num_scored: dict[str, int] = field(default_factory=dict)
    score_failures: dict[str, str] = field(default_factory=dict)
    attackers: list[str] = field(default_factory=list)  # those of a simulation
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    spent: tuple[float, float] | None = None
    is_last: bool = False
    aggregation_error: float | None = None  # see `factors.aggregation_error`
    adapter_with: Callable[[Collection[str]], Params] | None = None

    @property
    def loss(self) -> float | None:
        """Mean local training loss, weighted by examples; None without a reply."""
        return _mean_loss(self.metrics, self.num_examples)

    @property
    def score(self) -> float | None:
        """Mean loss of the new adapter on the clients' own records; None if not evaluated."""
        return _mean_loss(self.scores, self.num_scored)

    def require(self, min_replies: int) -> None:
        """Refuse to go on with fewer usable replies.

        Raises:
            FederationError: names every client that failed, and why; DivergedError if all did
                for NaN or Inf.
        """
        if len(self.metrics) >= min_replies:
            return
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(self.failures.items()))
        kind = DivergedError if self.diverged >= self.failures.keys() else FederationError
        raise kind(
            f"round {self.round}: {len(self.metrics)} of {len(self.sampled)} replies could be "
            f"used, federation.min_replies={min_replies}. {reasons}"
        )


class Recorder:
    """What is told of a run while it goes on, and decides when it ends; every method may be left.

    A run's own recorder writes metrics, checkpoints and tables; see `server.run_recorder`.
    """

    def on_start_round(self, round: int, names: list[str]) -> None:
        """Hears which clients a round asks, before the messages are sent."""

    def on_reply(self, round: int, name: str, loss: float | None) -> None:
        """Hears of each reply when it has come; loss None: it could not be used."""

    def on_update(self, round: int, name: str, delta: Params, acknowledged: int) -> None:
        """Gets each accepted update where clients keep their own adapters.

        Args:
            acknowledged: round of the client's accepted update before.
        """

    def on_round(self, state: ServerState, report: RoundReport) -> None:
        """Gets the state after a round, and what happened in it."""

    def on_failed_round(self, report: RoundReport) -> None:
        """Gets the report of a round in which too few replies could be used."""

    def oldest_checkpoint(self) -> int | None:
        """Round of the oldest state that the server may go back to; None: it never goes back."""
        return None

    def has_converged(self) -> bool:
        """Whether to end the run before its next round."""
        return False


def _mean_loss(
    metrics: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]
) -> float | None:
    total = sum(counts[name] for name in metrics)
    if not total or any("loss" not in each for each in metrics.values()):
        return None  # sites whose records are private do not tell
    return sum(metrics[name]["loss"] * counts[name] for name in sorted(metrics)) / total
