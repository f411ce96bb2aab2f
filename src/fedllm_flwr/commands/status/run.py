"""State of a run, read from its directory."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedllm_flwr.config.compose import load_run
from fedllm_flwr.federation.state import newest_readable
from fedllm_flwr.reporting.metrics import (
    RoundRecord,
    best_record,
    cut_clients,
    cut_lines,
    read_metrics,
    validation_losses,
)
from fedllm_flwr.reporting.text import fixed, format_bytes, format_seconds, one_line
from fedllm_flwr.runs.directory import RunDirectory, how_to_go_on, is_finished
from fedllm_flwr.runs.lock import CurrentRound, Holder, current_round, holder

_MOST_NAMES = 10  # maximum number of names in a line


@dataclass(frozen=True)
class RunStatus:
    """State of a run.

    ``state`` is running, finished, failed (with ``error``) or stopped (its process has ended).
    """

    path: str
    state: str
    algorithm: str
    data: str
    round: int  # last finished round
    num_rounds: int
    error: str
    pid: int | None  # its process, which may have ended
    host: str | None
    saved_round: int | None  # round of the newest checkpoint
    seconds_per_round: float | None  # mean
    bytes: int  # up and down, over all rounds
    failures: int  # missing or refused replies, over all rounds
    best_round: int | None  # round with the lowest validation loss
    best_loss: float | None
    current: CurrentRound | None  # the round in progress or interrupted
    last: RoundRecord | None  # record of the last finished round
    cut: dict[str, dict[str, int]] = field(default_factory=dict)  # see `cut_clients`
    command: str = "fedllm run"  # resumes the run, with resume=

    @property
    def is_well(self) -> bool:
        """Whether it is running or has finished."""
        return self.state in ("running", "finished")

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The state as lines of text."""
        where = f" (process {self.pid} on {self.host})" if self.state == "running" else ""
        early = self.state == "finished" and self.round < self.num_rounds
        done = f"{'stopped early after ' if early else ''}{self.round} of {self.num_rounds}"
        error = f": {one_line(self.error)}" if self.error else ""
        lines = [
            f"{self.path}: {self.state}, {done} rounds of {self.algorithm} on {self.data}"
            f"{where}{error}"
        ]
        if self.current is not None and self.state != "finished":
            lines += _round_now(self.current, self.state == "running")
        if self.last is not None and self.last["round"] > 0:
            lines += _round_done(self.last)
            mean = "" if self.seconds_per_round is None else f"{self.seconds_per_round:.1f} s"
            lines.append(
                f"  all rounds  {mean} each, {format_bytes(self.bytes)}, "
                f"{self.failures} {'reply' if self.failures == 1 else 'replies'} missing or refused"
            )
        lines += [f"  {one_line(line)}" for line in cut_lines(self.cut)]
        if self.best_round is not None:
            lines.append(
                f"  best        round {self.best_round}, eval loss {fixed(self.best_loss, 3)}"
            )
        if not self.is_well:
            kept = how_to_go_on(RunDirectory(Path(self.path).resolve()), self.command)
            lines.append(f"  {kept or 'nothing is saved; start a new run'}")
        return lines


def run_status(path: Path) -> RunStatus:
    """Read a run's directory.

    Raises:
        ConfigError: the directory contains no run.
        DataError: ``metrics.jsonl`` is damaged.
    """
    directory, config = RunDirectory(path), load_run(path, str(path))
    records = read_metrics(directory.metrics) if directory.metrics.is_file() else []
    finished = [item for item in records if not item.get("failed")]
    rounds = [item for item in finished if item["round"] > 0]
    who = holder(directory)
    if who is not None and who.is_alive:
        state = "running"
    elif who is None and is_finished(directory, config):
        state = "finished"
    else:
        state = "failed" if who is not None and who.error else "stopped"
    best = best_record(finished)
    losses = dict(validation_losses(finished))
    return RunStatus(
        path=str(path),
        state=state,
        algorithm=config.algorithm.name,
        data=config.data.name,
        round=rounds[-1]["round"] if rounds else 0,
        num_rounds=config.federation.num_rounds,
        error=who.error if who and not who.is_alive else "",
        pid=who.pid if who else None,
        host=who.host if who else None,
        saved_round=newest_readable(directory.checkpoints),
        seconds_per_round=sum(item["seconds"] for item in rounds) / len(rounds) if rounds else None,
        bytes=sum(item.get("bytes_up", 0) + item.get("bytes_down", 0) for item in rounds),
        failures=sum(len(item.get("failures") or {}) for item in records),
        best_round=None if best is None else int(best["round"]),
        best_loss=None if best is None else losses[best["round"]],
        current=current_round(directory),
        last=finished[-1] if finished else None,
        cut=cut_clients(records),
        command=who.command if who else Holder.command,
    )


def _round_now(current: CurrentRound, is_running: bool) -> list[str]:
    done, asked = len(current.losses), len(current.asked)
    took = f" for {format_seconds(time.time() - current.started)}" if is_running else ""
    line = f"  round {current.round:<5} {done} of {asked} clients have replied{took}"
    if current.waiting:
        line += (
            f", waiting for {_names(current.waiting)}" if is_running else ", then the run stopped"
        )
    return [line, *([f"              failed: {_names(current.failed)}"] if current.failed else [])]


def _round_done(record: RoundRecord) -> list[str]:
    clients: Mapping[str, Any] = record.get("clients") or {}
    failures: Mapping[str, str] = record.get("failures") or {}
    moved = record.get("bytes_up", 0) + record.get("bytes_down", 0)
    line = (
        f"  round {record['round']:<5} {len(clients)}/{len(clients) + len(failures)} clients, "
        f"loss {fixed(record.get('loss'), 3)}, {record['seconds']:.1f} s, {format_bytes(moved)}"
    )
    if scores := record.get("eval"):
        line += f", eval loss {fixed(scores.get('loss'), 3)}"
    why = [f"              {one_line(f'{name}: {text}')}" for name, text in failures.items()]
    return [line, *why]


def _names(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    shown = ", ".join(one_line(name) for name in names[:_MOST_NAMES])
    return f"{shown} and {more} more" if more > 0 else shown
