"""One JSON object per round in ``metrics.jsonl``, and their summary in ``summary.json``.

A record is plain data: ``round``, ``seconds``, and where they apply ``learning_rate``, ``loss``,
``clients`` and ``failures`` by client name, ``bytes_up``, ``bytes_down``, ``eval`` (metrics on the
held-out records, on evaluated rounds only) and ``client_eval``. ``refused`` has the clients that
could not take part in this start, ``evaluation_failures`` those that did not score the adapter,
``lost`` those that have lost their memory of the round given and started anew, ``ignored`` what
counts for no client; ``failed`` marks the round that a run stopped in.
``phases`` has the seconds by phase since the record before: start-up, training, federation,
evaluation, and the checkpoint that was saved after that record.
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
from fedllm_flwr.reporting.early_stopping import best_record

Record = dict[str, Any]

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends records to a file, each on the disk before `append` returns.

    Args:
        path: the file; its directory is made if needed.
        resume_from_round: keep the records up to this round (that of the checkpoint) and drop
            those of later rounds, which will be run again; None starts an empty file.

    Raises:
        FederationError: the file cannot be written.
        DataError: the file to resume is damaged before its last line.
    """

    def __init__(self, path: Path, resume_from_round: int | None = None) -> None:
        self.path = path
        kept: list[Record] = []
        if resume_from_round is not None and path.exists():
            kept = [item for item in read_metrics(path) if item["round"] <= resume_from_round]
        write_atomically(path, "".join(_line(item) for item in kept).encode())

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; NaN and infinity become null, as JSON has neither."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FederationError(
                f"cannot write {self.path}: {error.strerror or error}."
            ) from error


def read_metrics(path: Path) -> list[Record]:
    """All records of a file; a last line that a crash cut short is dropped with a warning.

    Raises:
        DataError: the file is missing, or a line other than the last is no record.
    """
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; give the directory of a run."
        ) from error
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_parse(line))
        except ValueError as error:
            if number < len(lines):
                raise DataError(f"{path}, line {number}: not a record ({error}).") from error
            logger.warning("%s, line %d: cut short and dropped", path, number)
    return records


def summarise(
    records: Sequence[Record], timings: Mapping[str, float], seconds: float | None = None
) -> dict[str, Any]:
    """The content of ``summary.json``; ``base`` holds the scores before training.

    Args:
        records: of all rounds, in order.
        timings: seconds by phase over all starts of the run; phases must not overlap.
        seconds: of the whole run, all starts together; what the phases leave of it becomes the
            phase ``rest``.
    """
    phases = dict(timings)
    covered = math.fsum(phases.values())
    if seconds is not None and seconds > covered:
        phases["rest"] = phases.get("rest", 0.0) + seconds - covered
    evaluated = [item for item in records if item.get("eval")]
    best = best_record(records)
    scores = None if best is None else best.get("eval") or {"loss": best["client_eval"]["loss"]}
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
    }


def name_of_start(init_adapter: str | None) -> str:
    """What tables call the scores before training: of the base model, or of a given adapter."""
    return "base" if init_adapter is None else "start"


def earlier_phases(path: Path, records: Sequence[Record], last_round: int) -> dict[str, float]:
    """Seconds by phase that the starts of a run before this one took.

    Args:
        path: ``summary.json``, there if the run was finished once and is now extended.
        records: of ``metrics.jsonl``.
        last_round: round of the newest checkpoint; what came after it is run again.
    """
    phases: dict[str, float] = defaultdict(float)
    summarised = -1
    with contextlib.suppress(OSError, ValueError):  # none, or cut short
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


def _parse(line: str) -> Record:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("round"), int):
        raise ValueError("an object with an integer 'round' is expected")
    return record


def _plain(value: Any) -> Any:
    """`value` with NumPy scalars as Python numbers and non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
