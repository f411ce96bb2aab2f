"""A run's cost and the spread of its clients, computed from its round records.

Report, figures and trackers all use these functions, so they show the same numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, pstdev

from fedllm_flwr.reporting.metrics import RoundRecord

MEGABYTES = "megabytes moved, both ways"
SECONDS = "seconds in rounds"
DRIFT = ("update_cosine", "update_norm")
"""By client: the cosine of its update to the round's mean update, and the norm of its update."""

CONTRIBUTIONS = ("leave_one_out", "update_alone")
"""By client, on the central held-out records: the loss without its update minus the loss with it,
and the loss with only its update (``evaluation.contribution``)."""


def deciding_score(records: Sequence[RoundRecord]) -> str:
    """The primary score of a run: accuracy if answers are classes, otherwise the loss."""
    scored = [record["eval"] for record in records if record.get("eval")]
    return "accuracy" if scored and "accuracy" in scored[-1] else "loss"


def costs(records: Sequence[RoundRecord]) -> dict[str, list[float]]:
    """Cumulative megabytes transferred and seconds in rounds, up to each record."""
    moved = (record.get("bytes_up", 0) + record.get("bytes_down", 0) for record in records)
    seconds = (float(record.get("seconds", 0.0)) for record in records)
    return {
        MEGABYTES: [count / 1e6 for count in accumulate(moved)],
        SECONDS: list(accumulate(seconds)),
    }


@dataclass(frozen=True)
class ClientSpread:
    """One score of every client in one round, see `client_spread`.

    Attributes:
        metric: accuracy or token accuracy if available, otherwise the loss.
        values: the score by client name.
    """

    metric: str
    values: Mapping[str, float]

    @property
    def ranked(self) -> list[str]:
        """Names of the clients, from best to worst."""
        return sorted(
            self.values, key=lambda name: self.values[name], reverse=self.metric != "loss"
        )

    @property
    def mean(self) -> float:
        """The unweighted mean over clients."""
        return fmean(self.values.values())

    @property
    def best(self) -> float:
        """Score of the best client."""
        return self.values[self.ranked[0]]

    @property
    def worst(self) -> float:
        """Score of the worst client."""
        return self.values[self.ranked[-1]]

    @property
    def range(self) -> float:
        """Difference between the best and the worst score."""
        return abs(self.best - self.worst)

    @property
    def deviation(self) -> float:
        """Standard deviation over the clients."""
        return pstdev(self.values.values())


def client_spread(record: RoundRecord) -> ClientSpread | None:
    """Scores of the global adapter on each client's own held-out records (evaluation.clients) or,
    with algorithm=local, of each client's adapter on the central held-out records; None without
    either.
    """
    each: Mapping[str, Mapping[str, float]] = (
        record.get("local") or (record.get("client_eval") or {}).get("clients") or {}
    )
    for metric in ("accuracy", "token_accuracy", "loss"):
        values = {n: scores[metric] for n, scores in each.items() if scores.get(metric) is not None}
        if values:
            return ClientSpread(metric, values)
    return None


def unrelated_cosine(num_clients: int) -> float:
    """Cosine of orthogonal updates of equal norm to their mean, for `num_clients` clients."""
    return 1 / math.sqrt(num_clients)
