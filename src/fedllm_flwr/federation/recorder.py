"""The report of a round, and the recorder that receives it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from fedllm_flwr.errors import DivergedError, FederationError
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Params


@dataclass
class RoundReport:
    """The results of one round, by client name.

    ``metrics``, ``num_examples`` and ``failures`` belong to training; ``scores`` and
    ``score_failures`` to the clients' evaluation of the new adapter, if there was one. ``ignored``
    lists replies and nodes that were not counted, such as duplicates; ``lost`` maps clients that
    have lost their memory to the round of that memory; ``cut`` is the fraction of each client's
    update that a robust combiner has excluded. ``spent`` is (epsilon, delta) after the round, if
    the run is differentially private; ``is_last``: another round would exceed
    ``privacy.target_epsilon``. ``norms`` and ``cosines`` describe the updates, see
    `directions.UpdateDirections`. ``adapter_with``, set if updates are kept
    (``evaluation.contribution``), returns the adapter that the round would have produced from the
    given clients alone.
    """

    round: int
    sampled: list[str]
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    num_examples: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)  # failures: the server rejected the reply
    diverged: set[str] = field(default_factory=set)  # failures: NaN or Inf
    lost: dict[str, int] = field(default_factory=dict)
    cut: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    num_scored: dict[str, int] = field(default_factory=dict)
    score_failures: dict[str, str] = field(default_factory=dict)
    attackers: list[str] = field(default_factory=list)  # simulated attackers
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
        """Require at least `min_replies` usable replies.

        Raises:
            FederationError: names every client that failed, and why; a DivergedError if all failed
                with NaN or Inf.
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
    """Observes a run, and may end it early; every method has a default that does nothing.

    The standard recorder writes metrics, checkpoints and tables; see `server.run_recorder`.
    """

    def on_start_round(self, round: int, names: list[str]) -> None:
        """Called with the sampled clients, before their messages are sent."""

    def on_reply(self, round: int, name: str, loss: float | None) -> None:
        """Called for each reply as it arrives; loss None: the reply was not usable."""

    def on_update(self, round: int, name: str, delta: Params, acknowledged: int) -> None:
        """Called with each accepted update, if clients keep their own adapters.

        Args:
            acknowledged: round of the client's previous accepted update.
        """

    def on_round(self, state: ServerState, report: RoundReport) -> None:
        """Called with the state after a round, and the round's report."""

    def on_failed_round(self, report: RoundReport) -> None:
        """Called with the report of a round that had too few usable replies."""

    def oldest_checkpoint(self) -> int | None:
        """Round of the oldest checkpoint that the server may resume from; None: it never does."""
        return None

    def has_converged(self) -> bool:
        """Whether to end the run before its next round."""
        return False


def _mean_loss(
    metrics: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]
) -> float | None:
    total = sum(counts[name] for name in metrics)
    if not total or any("loss" not in each for each in metrics.values()):
        return None  # sites with record-level privacy report no loss
    return sum(metrics[name]["loss"] * counts[name] for name in sorted(metrics)) / total
