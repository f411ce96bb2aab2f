"""The command: selects models and tasks, scores them, and writes the results."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fedllm_flwr.commands.evaluate.candidates import Candidate, collect
from fedllm_flwr.commands.evaluate.comparison import LOCAL, ScoreTable, compare_scores
from fedllm_flwr.commands.evaluate.page import RESULTS, write_report
from fedllm_flwr.commands.evaluate.scorer import Scored, Scorer
from fedllm_flwr.commands.evaluate.tables import (
    as_csv,
    as_markdown,
    as_records,
    as_text,
    every_metric,
    headline_tables,
)
from fedllm_flwr.config.participation import describe_local
from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.evaluation.coding import code_suite
from fedllm_flwr.evaluation.judging import open_ended
from fedllm_flwr.evaluation.suites.catalogue import (
    SuiteTask,
    all_suites,
    chosen_suites,
    chosen_tasks,
)
from fedllm_flwr.evaluation.suites.local_data import missing_files
from fedllm_flwr.evaluation.suites.options import RunOptions
from fedllm_flwr.evaluation.suites.requested import harness_version
from fedllm_flwr.evaluation.suites.score_cache import SamplesCache, default_cache
from fedllm_flwr.files import write_atomically
from fedllm_flwr.plugins import TEMPLATES
from fedllm_flwr.reporting.text import format_seconds
from fedllm_flwr.runs.directory import refuse_other_files
from fedllm_flwr.runs.fit import check_evaluation_fit
from fedllm_flwr.runs.report import report_or_warning

NOTES = (
    "value ± half of its 95 % interval: over seeds and examples for a mean over seeds (Student's "
    "t), over examples only for a single model (bootstrap)",
    "differences are paired (same seeds, examples and resamples); marks: significant at a "
    "family-wise error rate of 5 % per suite (Holm), * over seeds and examples, † over examples "
    "only, which applies to these adapters and not to other seeds",
)

_SHORTENED = {
    "cut": "prompts truncated at their start",
    "examples_left_out": "few-shot examples left out of prompts",
}


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of the command line."""

    runs: list[str] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    compare: str | None = None
    base: str | None = None
    suites: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    prompt: str = "trained"
    template: str | None = None
    output: str | None = None
    cache: str | None = None
    no_cache: bool = False
    options: RunOptions = field(default_factory=RunOptions)


def evaluate(request: EvaluateOptions) -> Path:
    """Score the models, and write tables and reports; return the output directory.

    Raises:
        FedLLMError: an option is invalid; raised before a model is loaded.
    """
    started = time.monotonic()
    _check(request)
    tasks, skipped = _tasks(request)
    suites = [all_suites()[name] for name in dict.fromkeys(task.suite for task in tasks)]
    by_runner = {task.runner: [t for t in tasks if t.runner == task.runner] for task in tasks}
    if "harness" in by_runner:
        harness_version()
    if "code" in by_runner:
        code_suite.check(request.options)
    if "open_ended" in by_runner:
        open_ended.check(by_runner["open_ended"], request.options)
    candidates = collect(
        request.runs, request.adapters, request.compare, request.base, request.template
    )
    check_evaluation_fit(candidates[0].config, request.prompt, request.template)
    output = _output(request)
    models = f"{len(candidates)} model{'s' * (len(candidates) > 1)}"
    print(f"evaluating {models} on {len(tasks)} task{'s' * (len(tasks) > 1)}   output  {output}")
    unfinished = [item.adapter.unfinished for item in candidates if item.adapter]
    for line in [*filter(None, dict.fromkeys(unfinished)), *skipped]:
        print(f"  {line}")
    place = Path(request.cache).expanduser() if request.cache else default_cache()
    cache = SamplesCache(None if request.no_cache else place)
    work = (output if request.no_cache else place) / "work"
    scorer = Scorer(request.options, request.prompt, cache, work)
    scored = scorer.score(candidates, tasks)
    comparison = compare_scores(candidates, scored, tasks, suites)
    notes = [*NOTES, *_notes(candidates, scored, tasks, request)]
    _write(output, comparison, scored, tasks, [*notes, *skipped])
    print("\n".join(["", as_text(comparison), "", *notes]))
    if candidates[0].config.tracking.report and (
        warning := report_or_warning(lambda: write_report(output))
    ):
        print(warning)
    took = format_seconds(time.monotonic() - started)
    print(
        f"Finished in {took}.  {output}: report.html (all results), results.md, results.csv, "
        "results.json, a figure per suite, predictions/"
    )
    return output


def _check(request: EvaluateOptions) -> None:
    request.options.check()
    if request.template is not None and request.template not in TEMPLATES.names():
        raise ConfigError(
            f"--template {request.template}: choose from {', '.join(TEMPLATES.names())}."
        )
    root = request.options.data_root
    if root is not None and not root.is_dir():
        raise ConfigError(f"--data-root {root}: no such directory.")
    reference = request.options.judging.reference
    if reference is not None and not reference.is_file():
        raise ConfigError(f"--reference {reference}: no such file.")
    if not request.suites and not request.tasks:
        raise ConfigError(
            f"give --suite (of {', '.join(all_suites())}) or --task; fedllm evaluate --list shows "
            "what there is."
        )


def _tasks(request: EvaluateOptions) -> tuple[list[SuiteTask], list[str]]:
    """The requested tasks, and a line for each task of a suite that is left out.

    Tasks requested by name must have their files.
    """
    named = chosen_tasks(request.tasks)
    root = request.options.data_root
    found, skipped = [], []
    for task in named:
        if root is not None and (missing := missing_files(task, root)):
            raise DataError(f"--task {task.name}: {missing[0]} is missing; it holds {task.source}.")
        found.append(task)
    of_suites = [task for suite in chosen_suites(request.suites) for task in suite.tasks]
    for task in of_suites:
        missing = missing_files(task, root) if root is not None else []
        reason = f"{missing[0]} is missing" if missing else None
        if reason is None and task.runner == "open_ended":
            reason = open_ended.what_lacks(task.name, request.options)
        if reason:
            skipped.append(f"left out: {task.name}, {reason}")
        elif task not in found:
            found.append(task)
    if not found:
        raise DataError(f"no task can be scored; {skipped[0]}.")
    return found, skipped


def _draw(output: Path, comparison: ScoreTable) -> None:
    """One figure per suite, with its tasks' first metrics and its averages."""
    from fedllm_flwr.reporting.plots import plot_bars

    for suite in dict.fromkeys(column.suite for column in comparison.columns):
        columns = [c for c in comparison.columns if c.suite == suite and c.headline]
        bars = {
            row.name: [
                (row.scores[c].value, *row.scores[c].interval) if c in row.scores else None
                for c in columns
            ]
            for row in comparison.rows
        }
        names = [column.task for column in columns]
        chances = [column.metric.chance for column in columns]
        plot_bars(names, bars, chances, output / f"{suite}.png", all_suites()[suite].title)


def _notes(
    candidates: Sequence[Candidate],
    scored: Scored,
    tasks: Sequence[SuiteTask],
    request: EvaluateOptions,
) -> list[str]:
    """Notes on the prompts, for readers of the scores."""
    lines = [f"prompts: {request.prompt}"]
    local = next((item.config for item in candidates if item.row == LOCAL), None)
    if local is not None and any(item.client for item in candidates):
        lines.append(f"{LOCAL}: {describe_local(local)}")
    limit, subset = request.options.limit, request.options.subset
    if limit is not None:
        lines.append(f"limit: the first {limit} examples of each part of a task")
    if subset is not None:
        lines.append(f"subset: {subset} examples of each part of a task, drawn at random")
    first = candidates[0].name
    remarks: dict[str, list[str]] = {}
    for task in tasks:
        notes = scored[first][task.name].notes
        if notes.get("remark"):
            remarks.setdefault(notes["remark"], []).append(task.name)
        for key, text in _SHORTENED.items():
            if notes.get(key):
                lines.append(f"{task.name}: {notes[key]} {text} to fit the model's context")
    lines += [f"{', '.join(names)}: {remark}" for remark, names in remarks.items()]
    every = [samples.notes for some in scored.values() for samples in some.values()]
    if judged := [notes for notes in every if "judge" in notes]:
        lines.append(open_ended.usage_line(judged))
    return lines


def _output(request: EvaluateOptions) -> Path:
    stamp = datetime.now().strftime("%m%d-%H%M")
    path = Path(request.output or f"outputs/{stamp}-evaluate").expanduser()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--output {path} is a file; give a directory.")
    own = ("results.*", "report.html", "*.png", "predictions", "work", ".*")
    refuse_other_files(path, f"--output {path}", own)
    return path


def _write(
    output: Path,
    comparison: ScoreTable,
    scored: Scored,
    tasks: Sequence[SuiteTask],
    notes: Sequence[str],
) -> None:
    """Write tables, results, figures, and all examples with their answers."""
    write_atomically(output / "results.md", as_markdown(comparison, notes).encode())
    write_atomically(output / "results.csv", as_csv(comparison).encode())
    _draw(output, comparison)
    prompts: dict[str, Any] = {}
    for model, by_task in scored.items():
        for name, samples in by_task.items():
            prompts.setdefault(name, samples.first_prompt)
            lines = "".join(f"{json.dumps(sample)}\n" for sample in samples.samples)
            write_atomically(
                output / "predictions" / _folder(model) / f"{name}.jsonl", lines.encode()
            )
    about = {
        "notes": list(notes),
        "results": as_records(comparison),
        "tables": headline_tables(comparison),
        "every_metric": every_metric(comparison),
        "first_prompts": prompts,
        "tasks": {task.name: {"title": task.title, "source": task.source} for task in tasks},
        "prompts": {
            model: {name: samples.notes for name, samples in some.items()}
            for model, some in scored.items()
        },
        "predictions": {model: _folder(model) for model in scored},
    }
    write_atomically(output / RESULTS, json.dumps(about, indent=2).encode())


def _folder(model: str) -> str:
    """Name of a model's folder in ``predictions/``."""
    return re.sub(r"[^\w.-]+", "_", model)
