"""Round records in ``metrics.jsonl``, early stopping, and the summary in ``summary.json``.

A record is plain data. It has ``round`` and ``seconds``, and if they apply:

- ``learning_rate``, ``loss`` (mean of the clients), ``bytes_up``, ``bytes_down``
- ``clients``, ``failures``: metrics, or the reason for a missing update, by client name
- ``eval``, ``client_eval``: scores on the central and on the clients' own held-out records
- ``aggregation_error``: distance of the new adapter from the mean of the clients' products B A, as
  a fraction of that mean's norm
- ``refused``: clients that cannot take part in this run; ``evaluation_failures``: clients that did
  not score the adapter; ``lost``: clients that lost their memory of a round, with that round;
  ``ignored``: replies that belong to no client; ``cut``: by client, the fraction of its update that
  a robust combiner excluded; ``refused_updates``: failures whose update arrived but was rejected;
  ``attackers``: simulated attackers that were sampled in this round
- ``update_norm``, ``update_cosine``: by client, the norm of its update and its cosine to the
  weighted mean of all updates; not with client-level privacy, which does not account for them
- ``leave_one_out``: by client, the increase of the loss on the central held-out records without its
  update in this round; ``update_alone``: the loss with only its update
- ``failed``: the run failed in this round
- ``epsilon``, ``delta``: the privacy spent so far, with differential privacy; ``budget_spent``:
  another round would exceed ``privacy.target_epsilon``
- ``phases``: seconds by phase since the previous record, including its checkpoint

The best round and early stopping depend only on these records, so a resumed run makes the same
decisions as an uninterrupted one.
"""

import contextlib
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm_flwr.errors import DataError, FederationError
from fedllm_flwr.files import write_atomically

RoundRecord = dict[str, Any]

logger = logging.getLogger(__name__)

_CUT_ROUNDS = 3


class MetricsLog:
    """Appends records to a file and syncs each one to disk.

    Args:
        path: the file; its directory is created if it does not exist.
        resume_from_round: round of the checkpoint to resume from; records of later rounds are
            dropped. None starts an empty file.

    Raises:
        FederationError: the file cannot be written.
        DataError: the file is damaged before its last line.
    """

    def __init__(self, path: Path, resume_from_round: int | None = None) -> None:
        self.path = path
        kept: list[RoundRecord] = []
        if resume_from_round is not None and path.exists():
            kept = [item for item in read_metrics(path) if item["round"] <= resume_from_round]
        write_atomically(path, "".join(_line(item) for item in kept).encode())

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record; NaN and infinity become null."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FederationError(
                f"cannot write {self.path}: {error.strerror or error}."
            ) from error


def read_metrics(path: Path) -> list[RoundRecord]:
    """All records of a file; an incomplete last line is dropped with a warning.

    Raises:
        DataError: the file is missing, or a line before the last is not a record.
    """
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; give a run's directory."
        ) from error
    records: list[RoundRecord] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("round"), int):
                raise ValueError("expected an object with an integer 'round'")
            records.append(record)
        except ValueError as error:
            if number < len(lines):
                raise DataError(f"{path}, line {number}: not a record ({error}).") from error
            logger.warning("%s, line %d: cut short and dropped", path, number)
    return records


def validation_losses(records: Sequence[RoundRecord]) -> list[tuple[int, float]]:
    """(round, loss) of the evaluated rounds; non-finite losses are infinite.

    The loss is that on the central held-out records or, without them, the mean of ``client_eval``.
    """
    section = "eval" if any(record.get("eval") for record in records) else "client_eval"
    found = []
    for record in records:
        if scores := record.get(section):
            loss = scores.get("loss")
            finite = loss is not None and math.isfinite(loss)
            found.append((int(record["round"]), float(loss) if finite else math.inf))
    return found


def best_record(records: Sequence[RoundRecord]) -> RoundRecord | None:
    """The record of the first round with the lowest validation loss; None if none is finite."""
    losses = [pair for pair in validation_losses(records) if math.isfinite(pair[1])]
    if not losses:
        return None
    best, _ = min(losses, key=lambda pair: pair[1])
    return next(item for item in records if item["round"] == best and not item.get("failed"))


def evaluations_without_better(records: Sequence[RoundRecord]) -> int:
    """Number of evaluations since the lowest validation loss."""
    lowest, waited = math.inf, 0
    for _, loss in validation_losses(records):
        if loss < lowest:
            lowest, waited = loss, 0
        else:
            waited += 1
    return waited


def has_converged(records: Sequence[RoundRecord], patience: int | None) -> bool:
    """Whether ``training.early_stopping=<patience>`` ends the run after these records."""
    return patience is not None and evaluations_without_better(records) >= patience


def why_stopped(records: Sequence[RoundRecord], last_round: int) -> str:
    """Message for a run that ended after `last_round`, before its last one."""
    if records and records[-1].get("budget_spent"):
        return (
            f"stopped after round {last_round}: epsilon {records[-1]['epsilon']:.3g} is spent, and "
            "another round would exceed privacy.target_epsilon"
        )
    waited, best = evaluations_without_better(records), best_record(records)
    found = "" if best is None else f", the best is in round {best['round']}"
    count = f"{waited} evaluation{'s' * (waited != 1)}"
    return f"stopped early after round {last_round}: no lower loss in {count}{found}"


def summarise(
    records: Sequence[RoundRecord], timings: Mapping[str, float], seconds: float | None = None
) -> dict[str, Any]:
    """The content of ``summary.json``; ``base`` contains the scores before training.

    Args:
        records: the records of all rounds, in order.
        timings: seconds by phase, summed over all starts of the run; phases do not overlap.
        seconds: duration of all starts; time outside the phases becomes the phase ``rest``.
    """
    phases = dict(timings)
    covered = math.fsum(phases.values())
    if seconds is not None and seconds > covered:
        phases["rest"] = phases.get("rest", 0.0) + seconds - covered
    evaluated = [item for item in records if item.get("eval")]
    best = best_record(records)
    scores = None if best is None else best.get("eval") or {"loss": best["client_eval"]["loss"]}
    promised = [item for item in records if "epsilon" in item]
    privacy = {key: promised[-1][key] for key in ("epsilon", "delta")} if promised else {}
    return {
        "base": evaluated[0]["eval"] if evaluated else None,
        "final": evaluated[-1]["eval"] if evaluated else None,
        "best": None if best is None else {"round": best["round"], **(scores or {})},
        "rounds": max((int(item["round"]) for item in records), default=0),
        "seconds": covered if seconds is None else seconds,
        "phases": phases,
        "bytes_up": sum(int(item.get("bytes_up", 0)) for item in records),
        "bytes_down": sum(int(item.get("bytes_down", 0)) for item in records),
        "failures": sum(len(item.get("failures", {})) for item in records),
        **({"cut": cut} if (cut := cut_clients(records)) else {}),
        **privacy,
    }


def cut_clients(records: Sequence[RoundRecord]) -> dict[str, dict[str, int]]:
    """Clients whose updates a robust combiner, or the check of replies, excludes repeatedly.

    An update counts as cut if more than half of it was excluded or the server rejected it. A client
    is listed if this holds in more than half of its rounds, and in at least `_CUT_ROUNDS`.

    Returns:
        Numbers of rounds by client: ``cut``, and ``of``, the rounds in which it replied.
    """
    counts: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        shares: Mapping[str, float] = record.get("cut") or {}
        for name in record.get("clients") or {}:
            counts[name].append(shares.get(name, 0.0) > 0.5)
        for name in record.get("refused_updates") or ():
            counts[name].append(True)
    return {
        name: {"cut": sum(found), "of": len(found)}
        for name, found in sorted(counts.items())
        if sum(found) >= _CUT_ROUNDS and sum(found) > len(found) / 2
    }


def cut_lines(cut: Mapping[str, Mapping[str, int]]) -> list[str]:
    """One line for each client of `cut_clients`."""
    return [
        f"{name}: its updates were cut or refused in {rounds['cut']} of {rounds['of']} rounds; "
        "check its data and its machine"
        for name, rounds in cut.items()
    ]


def name_of_start(init_adapter: str | None) -> str:
    """Label of the scores before training: ``base``, or ``start`` with ``init_adapter``."""
    return "base" if init_adapter is None else "start"


def earlier_phases(path: Path, records: Sequence[RoundRecord], last_round: int) -> dict[str, float]:
    """Seconds by phase of the earlier starts of a resumed run.

    Args:
        path: ``summary.json``, which exists if a finished run is extended.
        records: the records of ``metrics.jsonl``.
        last_round: round of the newest checkpoint; later rounds are repeated.
    """
    phases: dict[str, float] = defaultdict(float)
    summarised = -1
    with contextlib.suppress(OSError, ValueError):  # missing or incomplete
        summary = json.loads(path.read_text("utf-8"))
        phases.update(summary["phases"])
        summarised = int(summary["rounds"])
    for record in records:
        if summarised < record["round"] <= last_round:
            for name, seconds in record.get("phases", {}).items():
                phases[name] += seconds
    return dict(phases)


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json`` atomically; NaN and infinity become null.

    Raises:
        FederationError: the file cannot be written.
    """
    text = json.dumps(_plain(summary), indent=2, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_plain(record), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Convert NumPy scalars to Python numbers and non-finite numbers to None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
