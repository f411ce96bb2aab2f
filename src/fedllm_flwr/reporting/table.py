"""The table of rounds and the closing table, as lines of text."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedllm_flwr.reporting.metrics import RoundRecord
from fedllm_flwr.reporting.plan import SEPARATOR
from fedllm_flwr.reporting.text import fixed, format_seconds, one_line, shorten_middle, whole_parts
from fedllm_flwr.tasks import all_metrics

Metrics = Mapping[str, Any]

NOT_EVALUATED = "."  # not in this round; a dash means that the value does not exist
_MAX_CLIENTS_WIDTH = 40
_MIN_NAME_WIDTH = 8
_INDENT = 8


@dataclass(frozen=True)
class Column:
    """One column of the table of rounds; `cell` takes the record and the estimated seconds left."""

    title: str
    width: int
    cell: Callable[[RoundRecord, float | None], str]


class RoundTable:
    """Header and rows of the table of rounds.

    Args:
        client_names: the names known so far; the longest determines the clients column's width.
        metrics: names of scores on held-out records to show; unknown ones are left out.
        client_eval: show the mean loss on the clients' own held-out records.
        time_left: show the estimated time left, for output without a progress line.
        promises: show epsilon.
    """

    def __init__(
        self,
        client_names: Sequence[str],
        metrics: Sequence[str] = ("loss", "accuracy"),
        client_eval: bool = False,
        time_left: bool = False,
        promises: bool = False,
    ) -> None:
        longest = max((len(one_line(name)) for name in client_names), default=0)
        self._clients_width = min(max(18, longest + len("10/10 (: refused)")), _MAX_CLIENTS_WIDTH)
        chosen = [Column("loss", 8, lambda item, _: fixed(item.get("loss"), 3))]
        chosen += [
            Column(
                score.round_title,
                score.round_width,
                partial(_score, key=name, decimals=score.decimals),
            )
            for name, score in all_metrics().items()
            if score.round_width and name in metrics
        ]
        if client_eval:
            chosen.append(
                Column("client eval", 13, lambda item, _: _metric(item, "client_eval", "loss", 3))
            )
        if promises:
            chosen.append(Column("epsilon", 10, lambda item, _: fixed(item.get("epsilon"), 2)))
        chosen += [Column("seconds", 10, _seconds), Column("MB", 7, _megabytes)]
        if time_left:
            chosen.append(Column("left", 14, lambda _, left: _time_left(left)))
        self._columns = chosen

    def header(self) -> str:
        """Titles of the columns."""
        titles = "".join(f"{column.title:>{column.width}}" for column in self._columns)
        return f"{'round':>6}  {'clients':<{self._clients_width}}{titles}"

    def row(self, record: RoundRecord, seconds_left: float | None = None) -> str:
        """The row of one round."""
        cells = "".join(
            f"{column.cell(record, seconds_left):>{column.width}}" for column in self._columns
        )
        return f"{record['round']:>6}  {self._clients(record):<{self._clients_width}}{cells}"

    def failures(self, record: RoundRecord) -> list[str]:
        """Lines on missing replies and scores, clients that lost memory, and ignored replies."""
        failures: Mapping[str, str] = record.get("failures") or {}
        lines = [f"{name}: {reason}" for name, reason in sorted(failures.items())]
        unscored: Mapping[str, str] = record.get("evaluation_failures") or {}
        lines += [f"{name}: no scores, {reason}" for name, reason in sorted(unscored.items())]
        lost: Mapping[str, int] = record.get("lost") or {}
        lines += [
            f"{name}: it has lost its memory of round {before} and started anew"
            for name, before in sorted(lost.items())
        ]
        return [f"{' ' * _INDENT}{one_line(line)}" for line in lines + record.get("ignored", [])]

    def _clients(self, record: RoundRecord) -> str:
        """3/4 (desk-7: refused), 2/4 (2 failed), or a dash before the first round."""
        replied, failures = len(record.get("clients") or {}), record.get("failures") or {}
        sampled = replied + len(failures)
        if not sampled:
            return "-"
        share = f"{replied}/{sampled}"
        if len(failures) == 1:
            [(name, reason)] = failures.items()
            how = "left" if reason.startswith("no reply") else "failed"
            if reason.startswith("update refused"):
                how = "refused"
            room = self._clients_width - len(f"{share} (: {how})")
            if room < _MIN_NAME_WIDTH:
                return f"{share} (1 {how})"
            return f"{share} ({shorten_middle(one_line(name), room)}: {how})"
        return f"{share} ({len(failures)} failed)" if failures else share


def closing_table(rows: Sequence[tuple[str, Metrics]]) -> list[str]:
    """The loss and every other score of any row; header first."""
    shown = [
        (score.title, name, score.decimals)
        for name, score in all_metrics().items()
        if score.title and any(name in metrics for _, metrics in rows)
    ]
    label = max(len(name) for name, _ in rows)
    widths = [max(11, len(title) + 3) for title, _, _ in shown]
    titles = "".join(f"{c[0]:>{width}}" for c, width in zip(shown, widths, strict=True))
    lines = [f"  {'':<{label}}{titles}"]
    for name, metrics in rows:
        cells = [fixed(metrics.get(key), decimals) for _, key, decimals in shown]
        padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"  {name:<{label}}" + "".join(padded))
    return lines


def result_label(algorithm: str) -> str:
    """Label of a run's result in its closing table."""
    return {"local": "local (mean)", "centralized": "centralized"}.get(algorithm, "federated")


def summary_rows(
    summary: Mapping[str, Any], extra: Sequence[tuple[str, Metrics]], label: str, first: str
) -> list[tuple[str, Metrics]]:
    """The start, labelled `first`, the `extra` rows, the result, labelled `label`, and the best
    round if it is not the last.
    """
    base, final, best = summary.get("base"), summary.get("final"), summary.get("best")
    rows = [(first, base)] if base else []
    rows += extra
    if final:
        rows.append((label, final))
    if best and final and best["round"] != summary.get("rounds"):
        rows.append((f"best (round {best['round']})", best))
    return rows


def is_past_best(summary: Mapping[str, Any]) -> bool:
    """Whether a round before the last was clearly better, by 1 % of the loss."""
    final, best = summary.get("final"), summary.get("best")
    return bool(best and final and (final.get("loss") or math.inf) > 1.01 * best["loss"])


def finished_line(summary: Mapping[str, Any], since_resumed: float | None = None) -> str:
    """Finished in 58 s: 33 s training, 9 s start-up, ...; the parts add up to the total.

    `since_resumed` is the duration of the last start in seconds, for a resumed run.
    """
    total = float(summary["seconds"])
    text = f"Finished in {format_seconds(total)}"
    if since_resumed is not None:
        text += f" over all starts, {format_seconds(since_resumed)} since it was resumed"
    parts = whole_parts(summary.get("phases") or {}, round(total))
    if parts:
        text += ": " + ", ".join(f"{format_seconds(part)} {name}" for name, part in parts.items())
    return text + "."


def path_lines(paths: Mapping[str, Path], width: int) -> list[str]:
    """Labelled paths; those in the first one's folder are shortened to .../name."""
    cells: list[tuple[str, str]] = []
    directory: Path | None = None
    for label, path in paths.items():
        shown = f".../{path.name}" if directory and path.parent == directory else str(path)
        directory = directory or path.parent
        cells.append((label, shown))
    return _packed(cells, " " * 8, width)


def next_lines(commands: Sequence[str], width: int) -> list[str]:
    """Suggested next commands."""
    cells = [("" if i else "next", command) for i, command in enumerate(commands)]
    return _packed(cells, SEPARATOR, width)


def _packed(cells: Sequence[tuple[str, str]], gap: str, width: int) -> list[str]:
    """Labels and values side by side, wrapped at `width`."""
    lines: list[str] = []
    for label, value in cells:
        text = f"{label}   {value}" if label else value
        if lines and len(lines[-1]) + len(gap) + len(text) <= width:
            lines[-1] += gap + text
        else:
            lines.append(f"  {label:<7}   {value}")
    return lines


def _score(record: RoundRecord, _: float | None, key: str, decimals: int) -> str:
    """The cell of a score on the held-out records in the table of rounds."""
    return _metric(record, "eval", key, decimals)


def _metric(record: RoundRecord, section: str, key: str, decimals: int) -> str:
    metrics = record.get(section)
    return fixed(metrics.get(key), decimals) if metrics else NOT_EVALUATED


def _seconds(record: RoundRecord, _: float | None) -> str:
    return fixed(record["seconds"], 1) if record["round"] and "seconds" in record else "-"


def _megabytes(record: RoundRecord, _: float | None) -> str:
    moved = record.get("bytes_up", 0) + record.get("bytes_down", 0)
    return fixed(moved / 1e6, 1 if moved >= 1e5 else 3) if moved else "-"


def _time_left(seconds: float | None) -> str:
    return "-" if seconds is None or seconds < 0.5 else format_seconds(seconds)
