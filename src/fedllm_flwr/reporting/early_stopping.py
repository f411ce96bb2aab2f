"""Which round is the best so far, and whether to wait for a better one.

Both follow from the records of ``metrics.jsonl`` alone, so that a run that goes on after a stop
decides as one that never stopped. The score is the loss on the central held-out records; where
there are none, the mean loss on the clients' own (``evaluation.clients``).
"""

import math
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]  # of `reporting.metrics`


def validation_losses(records: Sequence[Record]) -> list[tuple[int, float]]:
    """(round, loss) of the rounds that were scored; infinite where the loss was no number."""
    section = "eval" if any(record.get("eval") for record in records) else "client_eval"
    found = []
    for record in records:
        if scores := record.get(section):
            loss = scores.get("loss")
            finite = loss is not None and math.isfinite(loss)
            found.append((int(record["round"]), float(loss) if finite else math.inf))
    return found


def best_record(records: Sequence[Record]) -> Record | None:
    """The record of the round with the lowest loss, the first of equals; None without a score."""
    losses = [pair for pair in validation_losses(records) if math.isfinite(pair[1])]
    if not losses:
        return None
    best, _ = min(losses, key=lambda pair: pair[1])
    return next(item for item in records if item["round"] == best and not item.get("failed"))


def evaluations_without_better(records: Sequence[Record]) -> int:
    """How many evaluations in a row have brought no lower loss than one before them."""
    lowest, waited = math.inf, 0
    for _, loss in validation_losses(records):
        if loss < lowest:
            lowest, waited = loss, 0
        else:
            waited += 1
    return waited


def has_converged(records: Sequence[Record], patience: int | None) -> bool:
    """Whether ``training.early_stopping`` = `patience` ends the run after these records."""
    return patience is not None and evaluations_without_better(records) >= patience


def why_stopped(records: Sequence[Record], last_round: int) -> str:
    """What to say of a run that ``training.early_stopping`` has ended after `last_round`."""
    waited, best = evaluations_without_better(records), best_record(records)
    found = "" if best is None else f", the best is that of round {best['round']}"
    count = f"{waited} evaluation{'s' * (waited != 1)}"
    return f"stopped early after round {last_round}: no lower loss in {count}{found}"
