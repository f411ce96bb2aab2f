"""The report of an evaluation, made from its output files."""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.files import write_atomically
from fedllm_flwr.reporting.html.page import (
    Bar,
    Block,
    Cell,
    Figure,
    Folded,
    Page,
    Paragraphs,
    Section,
    Table,
)
from fedllm_flwr.reporting.html.render import render
from fedllm_flwr.reporting.text import shorten
from fedllm_flwr.runs.report import REPORT

RESULTS = "results.json"
_EXAMPLES = 20  # per task on the page; predictions/ has all of them
_LONGEST = 600  # maximum number of characters of an answer on the page
_MOST_BARS = 40  # tables with more rows are collapsed


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of an evaluation, by default to ``report.html`` in its directory.

    Raises:
        ConfigError: the directory contains no evaluation, or one of an earlier version.
    """
    try:
        about = json.loads((folder / RESULTS).read_text("utf-8"))
        page = evaluation_page(folder.resolve().name, about, _examples(folder, about))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{folder / RESULTS}: not in this version's format of results ({error!r}); evaluate "
            "again, cached scores are reused."
        ) from error
    path = output or folder / REPORT
    write_atomically(path, render(page).encode())
    return path


SamplesByTask = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # task -> model -> samples


def evaluation_page(name: str, about: Mapping[str, Any], examples: SamplesByTask) -> Page:
    """The whole page: the command's tables, bars of headline scores, and examples."""
    records: Sequence[Mapping[str, Any]] = about["results"]
    models = list(dict.fromkeys(record["model"] for record in records))
    suites = list(dict.fromkeys(record["suite"] for record in records))
    sections = []
    for suite in suites:
        tables: list[Block] = [
            _under_one_header(title, rows)
            for title, rows in about["tables"]
            if title.split(",")[0] == suite
        ]
        scores = [item for item in records if item["suite"] == suite and item["headline"]]
        drawn = Table(
            ["task", "model", "score", "chance level"],
            [_bar_row(item) for item in scores],
            note="Whiskers: 95 % intervals.",
        )
        shown: Block = Folded("Bars of the scores", [drawn]) if len(scores) > _MOST_BARS else drawn
        sections.append(Section(f"Suite {suite}", [*tables, shown]))
    header, *body = about["every_metric"]
    return Page(
        title=f"Evaluation on {', '.join(suites)}",
        subtitle=f"Evaluation {name}",
        headline=f"{len(models)} models: {', '.join(models[:8])}{' ...' * (len(models) > 8)}.",
        figures=[
            Figure("models", str(len(models))),
            Figure("suites", str(len(suites))),
            Figure("tasks", str(len(about["tasks"]))),
            Figure(
                "examples", f"{max(item['examples'] for item in records):,}", "in the largest task"
            ),
        ],
        sections=[
            *sections,
            Section("Notes", [Paragraphs(about["notes"])]),
            Section(
                "All metrics", [Folded("All metrics with 95 % intervals", [Table(header, body)])]
            ),
            Section("Examples", [_task(task, about, some) for task, some in examples.items()]),
        ],
    )


def _under_one_header(title: str, rows: Sequence[Sequence[str]]) -> Table:
    """A table of the command; tables of scores have the metrics in an unnamed second row."""
    header, *body = rows
    if body and not body[0][0]:
        header = [f"{task} {metric}".strip() for task, metric in zip(header, body[0], strict=True)]
        body = body[1:]
    return Table(header, body, title)


def _bar_row(record: Mapping[str, Any]) -> list[Cell]:
    value, low, high, chance = (record[key] for key in ("value", "low", "high", "chance"))
    drawn = Bar(f"{value:.3f}", value, low, high)
    title = f"{record['task']}, {record['metric']}"
    return [title, record["model"], drawn, "-" if chance is None else f"{chance:.3f}"]


def _task(
    task: str, about: Mapping[str, Any], by_model: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Block:
    """A task's first examples with all models side by side, below the first example's prompt."""
    models = list(by_model)
    ids = list(dict.fromkeys(str(some["id"]) for samples in by_model.values() for some in samples))
    samples = {model: {str(s["id"]): s for s in by_model[model]} for model in models}
    rows = []
    for name in ids[:_EXAMPLES]:
        found = [samples[model].get(name, {}) for model in models]
        target = next((_text(some["target"]) for some in found if "target" in some), "-")
        rows.append([name, target, *map(_answer, found)])
    prompt = about["first_prompts"].get(task, "")
    before: list[Block] = [Paragraphs([prompt], code=True)] if prompt else []
    note = (
        f"At most the first {_EXAMPLES}, with answers truncated to {_LONGEST} characters; "
        "predictions/ has all of them."
    )
    title = f"{task}: {about['tasks'][task]['title']}"
    return Folded(title, [*before, Table(["example", "expected", *models], rows, note=note)])


def _answer(sample: Mapping[str, Any]) -> str:
    """A model's answer and its scores."""
    prediction = sample.get("prediction")
    if isinstance(prediction, list) and len(prediction) == 2:
        said = _text(sample.get("answer") or prediction[1] or "-")
        mark = "right" if prediction[0] == prediction[1] else "wrong"
        return f"{said} ({mark if prediction[1] is not None else 'unparsable'})"
    plain = {
        key: value
        for key, value in sample.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    scores = ", ".join(f"{key} {value:.3g}" for key, value in plain.items())
    return "\n".join(
        filter(None, [_text(sample.get("answer", "")), f"({scores})" if scores else ""])
    )


def _text(value: Any) -> str:
    return shorten(value if isinstance(value, str) else json.dumps(value), _LONGEST)


def _examples(folder: Path, about: Mapping[str, Any]) -> SamplesByTask:
    """The first examples of each task by model, from ``predictions/``."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for model, place in about["predictions"].items():
        for task in about["tasks"]:
            file = folder / "predictions" / place / f"{task}.jsonl"
            if file.is_file():
                with file.open(encoding="utf-8") as lines:
                    some = [json.loads(line) for line in islice(lines, _EXAMPLES)]
                found.setdefault(task, {})[model] = some
    return found
