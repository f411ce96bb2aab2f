"""What the records of a run say about its cost, and about how far its clients are apart.

Report, figures and trackers take these from here, so that all of them show the same numbers.
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
"""By client: how much its update points where the mean of its round does, and how long it is."""

CONTRIBUTIONS = ("leave_one_out", "update_alone")
"""By client, on the central held-out records: the loss without its update minus the loss with it;
the loss with its update alone (``evaluation.contribution``)."""


def deciding_score(records: Sequence[RoundRecord]) -> str:
    """The score by which a run is judged: accuracy where answers are classes, else the loss."""
    scored = [record["eval"] for record in records if record.get("eval")]
    return "accuracy" if scored and "accuracy" in scored[-1] else "loss"


def costs(records: Sequence[RoundRecord]) -> dict[str, list[float]]:
    """Megabytes moved, and seconds in rounds, from the start to the end of each record."""
    moved = (record.get("bytes_up", 0) + record.get("bytes_down", 0) for record in records)
    seconds = (float(record.get("seconds", 0.0)) for record in records)
    return {
        MEGABYTES: [count / 1e6 for count in accumulate(moved)],
        SECONDS: list(accumulate(seconds)),
    }


@dataclass(frozen=True)
class ClientSpread:
    """One score of all clients in one round, see `client_spread`; ``best`` and ``worst`` by name.

    Attributes:
        metric: accuracy or token accuracy where these are known, else the loss.
        values: by client.
    """

    metric: str
    values: Mapping[str, float]

    @property
    def ranked(self) -> list[str]:
        """Clients from the best to the worst."""
        return sorted(
            self.values, key=lambda name: self.values[name], reverse=self.metric != "loss"
        )

    @property
    def mean(self) -> float:
        """Each client counts the same, whatever its size."""
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
        """Distance from the best to the worst."""
        return abs(self.best - self.worst)

    @property
    def deviation(self) -> float:
        """Standard deviation over the clients."""
        return pstdev(self.values.values())


def client_spread(record: RoundRecord) -> ClientSpread | None:
    """Scores of the global adapter on each client's own held-out records (evaluation.clients), or
    with algorithm=local of each client's adapter on the shared ones; None without either.
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
    """Cosine to their mean of `num_clients` updates of one length in unrelated directions."""
    return 1 / math.sqrt(num_clients)
