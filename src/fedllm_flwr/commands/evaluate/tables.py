"""The comparison as text for a terminal, Markdown, CSV and JSON."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from fedllm_flwr.commands.evaluate.candidates import BASE
from fedllm_flwr.commands.evaluate.results import LOCAL, Column, Comparison, Row
from fedllm_flwr.evaluation.suites.statistics import Score

Cells = list[str]
_WIDEST = 6  # columns side by side


def as_text(comparison: Comparison) -> str:
    """Headline scores for a terminal, suite by suite."""
    blocks = []
    for title, table in _tables(comparison):
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = [title]
        for name, *values in table:
            padded = [f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True)]
            lines.append("   ".join([f"{name:<{widths[0]}}", *padded]).rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_markdown(comparison: Comparison, notes: Sequence[str]) -> str:
    """Headline scores, then every metric."""
    parts = ["# Evaluation"]
    for title, (names, *body) in _tables(comparison):
        parts.append(f"## {title}\n\n{_markdown([names, *body])}")
    parts.append("\n".join(f"- {note}" for note in notes))
    rows = [["task", "metric", *(row.name.strip() for row in comparison.rows)]]
    for column in comparison.columns:
        values = [_interval(row.scores.get(column)) for row in comparison.rows]
        rows.append([column.task, column.metric, *values])
    parts.append(f"## Every metric, with its 95 % interval\n\n{_markdown(rows)}")
    return "\n\n".join(parts) + "\n"


def as_csv(comparison: Comparison) -> str:
    """One line per model and metric, numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["suite", "task", "metric", "model", "models", "examples", "chance"]
    numbers = ["value", "low", "high", "interval_over", "std_over_seeds"]
    parts = ("vs", "vs_low", "vs_high", "vs_interval_over")
    pairs = [f"{part}_{to}" for to in (BASE, LOCAL) for part in parts]
    writer.writerow([*names, *numbers, *pairs])
    for record in as_records(comparison):
        pair = [
            value for to in (BASE, LOCAL) for value in record[f"vs_{to}"] or (None,) * len(parts)
        ]
        writer.writerow([*(record[name] for name in (*names, *numbers)), *pair])
    return text.getvalue()


def as_records(comparison: Comparison) -> list[dict[str, Any]]:
    """Every number as plain data."""
    return [
        _record(comparison, column, row)
        for column in comparison.columns
        for row in comparison.rows
        if column in row.scores
    ]


def _record(comparison: Comparison, column: Column, row: Row) -> dict[str, Any]:
    score = row.scores[column]
    low, high = score.interval
    differences = {}
    for to in (BASE, LOCAL):
        difference = comparison.difference(row, column, to)
        differences[f"vs_{to}"] = difference and (
            difference.value,
            *difference.interval,
            difference.over,
        )
    return {
        "suite": column.suite,
        "task": column.task,
        "metric": column.metric,
        "model": row.name.strip(),
        "models": row.num_models,
        "examples": score.num_examples,
        "chance": column.chance,
        "value": score.value,
        "low": low,
        "high": high,
        "interval_over": score.over,
        "std_over_seeds": row.spread.get(column),
        **differences,
    }


def _tables(comparison: Comparison) -> list[tuple[str, list[Cells]]]:
    """Headline scores of each suite, and the differences to base and to local."""
    found = []
    for suite in dict.fromkeys(column.suite for column in comparison.columns):
        columns = [c for c in comparison.columns if c.suite == suite and c.headline]
        for start in range(0, len(columns), _WIDEST):
            part = columns[start : start + _WIDEST]
            found.append((suite, _scores(comparison, part)))
            for to in (BASE, LOCAL):
                table = _differences(comparison, part, to)
                if len(table) > 1:
                    found.append((f"{suite}, difference to {to}", table))
    return found


def _scores(comparison: Comparison, columns: Sequence[Column]) -> list[Cells]:
    table = [["", *(column.task for column in columns)], ["", *(c.metric for c in columns)]]
    for row in comparison.rows:
        table.append([row.name, *(_cell(row, column) for column in columns)])
    if any(column.chance is not None for column in columns):
        chances = ["-" if c.chance is None else f"{c.chance:.3f}" for c in columns]
        table.append(["by chance", *chances])
    return table


def _differences(comparison: Comparison, columns: Sequence[Column], to: str) -> list[Cells]:
    table = [["", *(column.task for column in columns)]]
    for row in comparison.rows:
        found = [comparison.difference(row, column, to) for column in columns]
        if any(item is not None for item in found):
            table.append([row.name, *(_difference(item) for item in found)])
    return table


def _cell(row: Row, column: Column) -> str:
    if column not in row.scores:
        return "-"
    score = row.scores[column]
    low, high = score.interval
    return f"{score.value:.3f} ± {(high - low) / 2:.3f}"


def _difference(difference: Score | None) -> str:
    if difference is None:
        return "-"
    low, high = difference.interval
    mark = "*" if difference.num_seeds > 1 else "†"
    return f"{difference.value:+.3f} ± {(high - low) / 2:.3f} {mark if difference.clear else ' '}"


def _interval(score: Score | None) -> str:
    if score is None:
        return "-"
    low, high = score.interval
    return f"{score.value:.3f} [{low:.3f}, {high:.3f}]"


def _markdown(table: list[Cells]) -> str:
    names, *body = table
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
