"""Formats the comparison as terminal text, Markdown and CSV."""

import csv
import io
from collections.abc import Sequence

from fedllm_flwr.commands.compare.results import ComparisonRow, Spread
from fedllm_flwr.evaluation.suites.statistics import clear_together
from fedllm_flwr.reporting.text import markdown_table, text_table
from fedllm_flwr.tasks import all_metrics, table_metrics


def lines_of(rows: Sequence[ComparisonRow], metric: str) -> list[list[str]]:
    """The table as text, header first, with columns that any row has; ``-`` for missing values."""
    scores = [name for name in table_metrics()[1:] if any(name in row.final for row in rows)]
    titles = [all_metrics()[name].title for name in scores]
    header = ["", "loss", "best loss", *titles, f"{metric} vs local", "steps", "MB", "seconds"]
    tested = [row for row in rows if row.against_local and row.against_local.half_width is not None]
    together = clear_together([row.against_local.p_value for row in tested if row.against_local])
    clear = {row.name for row, found in zip(tested, together, strict=True) if found}
    lines = [header, *(_cells(row, scores, row.name in clear) for row in rows)]
    if any(row.aggregation_error is not None for row in rows):
        lines[0].append("BA error")
        for line, row in zip(lines[1:], rows, strict=True):
            error = row.aggregation_error
            line.append("-" if error is None else "0" if error < 1e-6 else f"{error:.3f}")
    return lines


def _cells(row: ComparisonRow, scores: Sequence[str], clear: bool) -> list[str]:
    difference, found = "-", row.against_local
    if found is not None and found.half_width is None:
        difference = f"{found.mean:+.3f}"
    elif found is not None:
        star = " *" if clear else "  "
        difference = f"{found.mean:+.3f} ± {found.half_width:.3f}{star}"
    return [
        row.name,
        _spread(row.final.get("loss"), 3),
        _spread(row.best_loss, 3),
        *(_spread(row.final.get(name), all_metrics()[name].card_decimals) for name in scores),
        difference,
        "-" if row.steps is None else f"{row.steps:.0f}",
        "-" if row.megabytes is None else f"{row.megabytes:.1f}",
        "-" if row.seconds is None else f"{row.seconds:.0f}",
    ]


def as_text(rows: Sequence[ComparisonRow], metric: str) -> str:
    """The table for a terminal."""
    return text_table(lines_of(rows, metric))


def own_records_lines(rows: Sequence[ComparisonRow]) -> list[list[str]]:
    """The table of scores on the clients' own held-out records, header first."""
    scores = [name for name in table_metrics() if any(name in row.final for row in rows)]
    header = ["on the clients' own records", *(all_metrics()[name].title for name in scores)]
    decimals = {name: 3 if name == "loss" else all_metrics()[name].card_decimals for name in scores}
    lines = [[row.name, *(_spread(row.final.get(n), decimals[n]) for n in scores)] for row in rows]
    return [header, *lines]


def as_markdown(rows: Sequence[ComparisonRow], metric: str, note: str) -> str:
    """A Markdown table with a note below it."""
    return f"{markdown_table(lines_of(rows, metric))}\n\n{note}\n"


def as_csv(rows: Sequence[ComparisonRow]) -> str:
    """CSV with full precision and a column for each mean and each standard deviation."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f"{metric}_{part}" for metric in table_metrics() for part in ("mean", "std")]
    best = ["best_loss_mean", "best_loss_std"]
    others = ["vs_local", "vs_local_half_width", "steps", "megabytes", "seconds"]
    others.append("aggregation_error")
    writer.writerow(["name", *names, *best, *others])
    for row in rows:
        spreads = [*(row.final.get(metric) for metric in table_metrics()), row.best_loss]
        numbers = [n for s in spreads for n in ((s.mean, s.deviation) if s else (None, None))]
        difference = row.against_local
        pair = (difference.mean, difference.half_width) if difference else (None, None)
        rest = (row.steps, row.megabytes, row.seconds, row.aggregation_error)
        writer.writerow([row.name.strip(), *numbers, *pair, *rest])
    return text.getvalue()


def _spread(spread: Spread | None, decimals: int) -> str:
    if spread is None:
        return "-"
    mean = f"{spread.mean:.{decimals}f}"
    return mean if spread.deviation is None else f"{mean} ± {spread.deviation:.{decimals}f}"
