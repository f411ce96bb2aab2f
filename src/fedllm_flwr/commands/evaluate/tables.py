"""Formats the comparison as terminal text, Markdown, CSV and JSON."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from fedllm_flwr.commands.evaluate.candidates import BASE
from fedllm_flwr.commands.evaluate.comparison import LOCAL, ModelRow, ScoreColumn, ScoreTable
from fedllm_flwr.evaluation.suites.statistics import IntervalEstimate, clear_together
from fedllm_flwr.reporting.text import markdown_table, text_table

UNPARSABLE = "unparsable"  # name of a task's metric: the share of answers that cannot be read
_WIDEST = 6  # maximum number of columns side by side
_EVERY = "All metrics, with 95 % intervals"


def as_text(comparison: ScoreTable) -> str:
    """Headline scores by suite, for a terminal."""
    tables = headline_tables(comparison)
    return "\n\n".join(f"{title}\n{text_table(table)}" for title, table in tables)


def as_markdown(comparison: ScoreTable, notes: Sequence[str]) -> str:
    """Headline scores, followed by all metrics."""
    parts = ["# Evaluation"]
    parts += [
        f"## {title}\n\n{markdown_table(table)}" for title, table in headline_tables(comparison)
    ]
    parts.append("\n".join(f"- {note}" for note in notes))
    parts.append(f"## {_EVERY}\n\n{markdown_table(every_metric(comparison))}")
    return "\n\n".join(parts) + "\n"


def as_csv(comparison: ScoreTable) -> str:
    """One line per model and metric, with full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["suite", "task", "metric", "model", "models", "examples", "chance"]
    numbers = ["value", "low", "high", "interval_over", "std_over_seeds"]
    parts = ("vs", "vs_low", "vs_high", "vs_interval_over", "vs_p_value")
    pairs = [f"{part}_{to}" for to in (BASE, LOCAL) for part in parts]
    writer.writerow([*names, *numbers, *pairs])
    for record in as_records(comparison):
        pair = [
            value for to in (BASE, LOCAL) for value in record[f"vs_{to}"] or (None,) * len(parts)
        ]
        writer.writerow([*(record[name] for name in (*names, *numbers)), *pair])
    return text.getvalue()


def as_records(comparison: ScoreTable) -> list[dict[str, Any]]:
    """All scores as JSON values."""
    return [
        _record(comparison, column, row)
        for column in comparison.columns
        for row in comparison.rows
        if column in row.scores
    ]


def _record(comparison: ScoreTable, column: ScoreColumn, row: ModelRow) -> dict[str, Any]:
    score = row.scores[column]
    low, high = score.interval
    differences = {}
    for to in (BASE, LOCAL):
        difference = comparison.difference(row, column, to)
        differences[f"vs_{to}"] = difference and (
            difference.value,
            *difference.interval,
            difference.over,
            difference.p_value,
        )
    return {
        "suite": column.suite,
        "task": column.task,
        "metric": column.metric.name,
        "headline": column.headline,
        "model": row.name.strip(),
        "models": row.num_models,
        "examples": score.num_examples,
        "chance": column.metric.chance,
        "value": score.value,
        "low": low,
        "high": high,
        "interval_over": score.over,
        "std_over_seeds": row.spread.get(column),
        **differences,
    }


def headline_tables(comparison: ScoreTable) -> list[tuple[str, list[list[str]]]]:
    """Headline scores of each suite, and the differences from base and local."""
    found = []
    for suite in dict.fromkeys(column.suite for column in comparison.columns):
        columns = [c for c in comparison.columns if c.suite == suite and c.headline]
        marked = {to: _differences(comparison, columns, to) for to in (BASE, LOCAL)}
        for start in range(0, len(columns), _WIDEST):
            part = columns[start : start + _WIDEST]
            found.append((suite, _scores(comparison, part)))
            for to, cells in marked.items():
                table = [["", *(column.task for column in part)]]
                for row in comparison.rows:
                    texts = [cells.get((row.name, column)) for column in part]
                    if any(texts):
                        table.append([row.name, *(text or "-" for text in texts)])
                if len(table) > 1:
                    found.append((f"{suite}, difference from {to}", table))
        shares = [
            column
            for column in comparison.columns
            if column.suite == suite and column.metric.name == UNPARSABLE
        ]
        for start in range(0, len(shares), _WIDEST):
            part = shares[start : start + _WIDEST]
            found.append((f"{suite}, share of unparsable answers", _scores(comparison, part)))
    return found


def every_metric(comparison: ScoreTable) -> list[list[str]]:
    """A table with a row per metric and a column per model."""
    rows = [["task", "metric", *(row.name.strip() for row in comparison.rows)]]
    for column in comparison.columns:
        values = [_interval(row.scores.get(column)) for row in comparison.rows]
        rows.append([column.task, column.metric.name, *values])
    return rows


def _scores(comparison: ScoreTable, columns: Sequence[ScoreColumn]) -> list[list[str]]:
    table = [["", *(column.task for column in columns)], ["", *(c.metric.name for c in columns)]]
    for row in comparison.rows:
        cells = [row.name]
        for column in columns:
            if column in row.scores:
                low, high = row.scores[column].interval
                cells.append(f"{row.scores[column].value:.3f} ± {(high - low) / 2:.3f}")
            else:
                cells.append("-")
        table.append(cells)
    chances = [column.metric.chance for column in columns]
    if any(chance is not None for chance in chances):
        shown = ["-" if chance is None else f"{chance:.3f}" for chance in chances]
        table.append(["chance level", *shown])
    return table


def _differences(
    comparison: ScoreTable, columns: Sequence[ScoreColumn], to: str
) -> dict[tuple[str, ScoreColumn], str]:
    """Differences of a suite by row and column; * and † mark the significant ones."""
    found = {
        (row.name, column): difference
        for row in comparison.rows
        for column in columns
        if (difference := comparison.difference(row, column, to)) is not None
    }
    cells = {}
    together = clear_together([score.p_value for score in found.values()])
    for (key, score), clear in zip(found.items(), together, strict=True):
        low, high = score.interval
        mark = ("*" if score.num_seeds > 1 else "†") if clear else " "
        cells[key] = f"{score.value:+.3f} ± {(high - low) / 2:.3f} {mark}"
    return cells


def _interval(score: IntervalEstimate | None) -> str:
    if score is None:
        return "-"
    low, high = score.interval
    return f"{score.value:.3f} [{low:.3f}, {high:.3f}]"
