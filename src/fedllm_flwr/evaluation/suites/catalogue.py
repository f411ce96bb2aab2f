"""Catalogue of the suites, read from ``evaluation/<suite>/suite.yaml``.

A ``suite.yaml`` has ``title``, ``runner`` (default ``harness``), ``tasks`` and ``averages``. The
keys of a task are the fields of `SuiteTask`, those of a metric the fields of `SuiteMetric`, and
those of an average the fields of `Average`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fedllm_flwr.config.names import did_you_mean
from fedllm_flwr.errors import ConfigError

_PACKAGE = Path(__file__).parents[2]
KINDS = (
    *("mean", "accuracy", "macro_f1", "micro_f1", "weighted_f1", "bleu", "smoothed_bleu"),
    *("set_precision", "set_recall", "set_f1"),
)


@dataclass(frozen=True)
class SuiteMetric:
    """A metric of a task, computed over its examples.

    Args:
        name: its name in tables.
        kind: ``mean`` of the column, or a score of [target, prediction] pairs or of counts, see
            `statistics.estimate`.
        column: the samples' field with a number, a pair or counts.
        parts: harness tasks whose examples are used; empty: all.
        chance: the score of guessing, if known.
        higher_is_better: whether the higher of two scores is better.
    """

    name: str
    kind: str = "mean"
    column: str = "prediction"
    parts: tuple[str, ...] = ()
    chance: float | None = None
    higher_is_better: bool = True


@dataclass(frozen=True)
class SuiteTask:
    """One data set with one prompt format.

    Args:
        name, title: its name on the command line, and its title.
        source: where the data are published; ``split`` and number of ``shots`` follow the
            ``protocol``, a paper or repository.
        licence: licence of the data, as stated by the publishers.
        labels: valid targets in lower case, if they are a fixed set; others are rejected.
        metrics: the first one represents the task in tables.
        files: file names in ``--data-root``; ``reader`` reads them as rows of the hub's schema.
        folder: folder of the harness' task files in the harness' ``tasks/``; empty: this suite's
            own folder.
        harness: names of its harness tasks.
        overrides: keys of the harness tasks to override; ``raw``: with bare prompts, ``local``:
            with local files.
        settings: settings of other runners than the harness.
    """

    name: str
    suite: str
    title: str
    source: str
    licence: str
    split: str
    protocol: str
    metrics: tuple[SuiteMetric, ...]
    labels: tuple[str, ...] = ()
    runner: str = "harness"
    shots: int = 0
    files: tuple[str, ...] = ()
    reader: str = ""
    folder: str = ""
    harness: tuple[str, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Average:
    """The mean of one metric over several tasks."""

    name: str
    tasks: tuple[str, ...]
    metric: str


@dataclass(frozen=True)
class Suite:
    """A group of tasks and its averages."""

    name: str
    title: str
    tasks: tuple[SuiteTask, ...]
    averages: tuple[Average, ...] = ()


def suites_dir() -> Path:
    """Directory of the suites: in the installed wheel, or in the checkout."""
    installed = _PACKAGE / "evaluation_suites"
    return installed if installed.is_dir() else _PACKAGE.parents[1] / "evaluation"


@cache
def all_suites() -> dict[str, Suite]:
    """Every suite by name, in alphabetical order."""
    files = sorted(suites_dir().glob("*/suite.yaml"))
    return {file.parent.name: _read(file) for file in files}


def chosen_suites(names: Sequence[str], typed: str = "--suite ") -> list[Suite]:
    """The suites with these names; error messages begin with `typed`, the text before the name.

    Raises:
        ConfigError: a name is unknown.
    """
    return [_named(all_suites(), name, "suite", typed) for name in dict.fromkeys(names)]


def chosen_tasks(names: Sequence[str]) -> list[SuiteTask]:
    """Tasks by name, from all suites.

    Raises:
        ConfigError: a name is unknown.
    """
    known = {task.name: task for suite in all_suites().values() for task in suite.tasks}
    return [_named(known, name, "task", "--task ") for name in dict.fromkeys(names)]


def _named(known: dict[str, Any], name: str, kind: str, typed: str) -> Any:
    if name in known:
        return known[name]
    hint = did_you_mean(name, known, cutoff=0.4)
    raise ConfigError(f"{typed}{name}: no such {kind}.{hint} (fedllm evaluate --list lists all)")


def _read(file: Path) -> Suite:
    name = file.parent.name
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    runner = values.get("runner", "harness")
    tasks = tuple(_task(name, runner, item) for item in values["tasks"])
    averages = tuple(_typed(Average, item) for item in values.get("averages", ()))
    return Suite(name, values["title"], tasks, averages)


def _task(suite: str, runner: str, item: dict[str, Any]) -> SuiteTask:
    """A task with its listed metrics and, with ``by_part``, one metric per part."""
    listed = [_typed(SuiteMetric, metric) for metric in item["metrics"]]
    union = [part for metric in listed for part in metric.parts]
    parts = item.get("harness") or list(dict.fromkeys(union))
    if each := item.get("by_part"):
        prefix = item.get("settings", {}).get("prefix", "")
        names = {part: part.removeprefix(prefix).replace("_", " ") for part in parts}
        listed += [SuiteMetric(name=names[part], parts=(part,), **each) for part in parts]
    rest = {key: value for key, value in item.items() if key != "by_part"}
    own = {"suite": suite, "harness": parts, "metrics": listed}
    task: SuiteTask = _typed(SuiteTask, {"runner": runner, **rest, **own})
    return task


def _typed(cls: Any, item: dict[str, Any]) -> Any:
    """A dataclass from YAML values; lists become tuples."""
    known = {entry.name for entry in fields(cls)}
    if unknown := sorted(set(item) - known):
        raise ValueError(f"suite.yaml: {cls.__name__} has no key {unknown[0]}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in item.items()})
