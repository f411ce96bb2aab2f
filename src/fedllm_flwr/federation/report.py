"""What happened in a round, and who is told."""

from collections.abc import Callable, Mapping
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
    clients that have started anew, each with the round of which its memory is lost.
    """

    round: int
    sampled: list[str]
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    num_examples: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    diverged: set[str] = field(default_factory=set)  # those of the failures with NaN or Inf
    lost: dict[str, int] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    num_scored: dict[str, int] = field(default_factory=dict)
    score_failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def loss(self) -> float | None:
        """Mean local training loss, weighted by examples; None without a reply."""
        return _mean_loss(self.metrics, self.num_examples)

    @property
    def score(self) -> float | None:
        """Mean loss of the new adapter on the clients' own records; None if not evaluated."""
        return _mean_loss(self.scores, self.num_scored)

    def require(self, min_replies: int, tell: Callable[["RoundReport"], None]) -> None:
        """Refuse to go on with fewer usable replies, once `tell` has heard of this round.

        Raises:
            FederationError: names every client that failed, and why; DivergedError if all did
                for NaN or Inf.
        """
        if len(self.metrics) >= min_replies:
            return
        tell(self)
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(self.failures.items()))
        kind = DivergedError if self.diverged >= self.failures.keys() else FederationError
        raise kind(
            f"round {self.round}: {len(self.metrics)} of {len(self.sampled)} replies could be "
            f"used, federation.min_replies={min_replies}. {reasons}"
        )


@dataclass
class Hooks:
    """What the server does around a round; every hook may be left out.

    ``on_start_round(round, names)`` before the messages are sent, ``on_reply(round, name, loss)``
    after each reply (loss None: it could not be used), ``on_update(round, name, delta,
    acknowledged)`` for each update that was accepted where clients train alone, with the round of
    the client's update before, ``on_round(state, report)`` at the end, ``on_failed_round(report)``
    instead where too few replies could be used. ``oldest_checkpoint()`` is the round of the oldest
    state that the server may go back to; None: it never goes back.
    ``has_converged()`` before a round is whether the run is to end early.
    """

    on_start_round: Callable[[int, list[str]], None] = lambda *_: None
    on_reply: Callable[[int, str, float | None], None] = lambda *_: None
    on_update: Callable[[int, str, Params, int], None] = lambda *_: None
    on_round: Callable[[ServerState, RoundReport], None] = lambda *_: None
    on_failed_round: Callable[[RoundReport], None] = lambda *_: None
    oldest_checkpoint: Callable[[], int | None] = lambda: None
    has_converged: Callable[[], bool] = lambda: False


def _mean_loss(
    metrics: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]
) -> float | None:
    total = sum(counts[name] for name in metrics)
    if not total:
        return None
    return sum(metrics[name]["loss"] * counts[name] for name in sorted(metrics)) / total
