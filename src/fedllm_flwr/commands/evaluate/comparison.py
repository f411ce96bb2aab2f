"""Scores of every model on every task, and paired differences between models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import stdev
from typing import Any

from fedllm_flwr.commands.evaluate.candidates import Candidate
from fedllm_flwr.commands.evaluate.scorer import Scored
from fedllm_flwr.evaluation.suites.catalogue import Suite, SuiteMetric, SuiteTask
from fedllm_flwr.evaluation.suites.scores import average_estimate, task_estimates
from fedllm_flwr.evaluation.suites.statistics import Estimate, IntervalEstimate, mean_of, over_seeds

LOCAL = "local"


@dataclass(frozen=True)
class ScoreColumn:
    """A column of the comparison: a metric of a task, or an average over tasks."""

    suite: str
    task: str
    metric: SuiteMetric
    headline: bool = False  # represents its task in tables


@dataclass(frozen=True)
class ModelRow:
    """One model, or the mean over the models of one row (seeds, clients)."""

    name: str
    by_seed: Mapping[ScoreColumn, Mapping[int | None, Estimate]]  # seed None: the model has no seed
    scores: Mapping[ScoreColumn, IntervalEstimate]
    spread: Mapping[ScoreColumn, float]  # standard deviation over seeds, if there are several
    num_models: int = 1


@dataclass(frozen=True)
class ScoreTable:
    """All rows of one evaluation."""

    columns: list[ScoreColumn]
    rows: list[ModelRow]

    def difference(self, row: ModelRow, column: ScoreColumn, to: str) -> IntervalEstimate | None:
        """A row's score minus another row's, paired by example and seed.

        A model without a seed, such as the base model, is paired with every seed of the other.
        """
        other = next((item for item in self.rows if item.name == to), None)
        if other is None or other is row or row.name.startswith(" "):
            return None
        if column not in row.scores or column not in other.scores:
            return None
        own, others = row.by_seed[column], other.by_seed[column]
        if None in own:
            own = dict.fromkeys(others, own[None])
        elif None in others:
            others = dict.fromkeys(own, others[None])
        paired = [own[seed].minus(others[seed]) for seed in own if seed in others]
        return over_seeds(paired) if paired else None


_Chooser = Callable[[ScoreColumn, Sequence[Estimate]], Estimate]


def compare_scores(
    candidates: Sequence[Candidate],
    scored: Scored,
    tasks: Sequence[SuiteTask],
    suites: Sequence[Suite],
) -> ScoreTable:
    """Scores of all candidates, averaged within rows, first over clients and then over seeds."""
    columns = _columns(tasks, suites)
    each = {item.name: _scores_of(scored[item.name], tasks, suites) for item in candidates}
    rows = []
    for name in dict.fromkeys(item.row for item in candidates):
        members = [item for item in candidates if item.row == name]
        rows.append(_row(name, members, each, columns, lambda _, some: mean_of(some)))
        if any(item.client for item in members):
            rows.append(_row("  best client", members, each, columns, _best))
            rows.append(_row("  worst client", members, each, columns, _worst))
    return ScoreTable(columns, rows)


def _best(column: ScoreColumn, scores: Sequence[Estimate]) -> Estimate:
    return (max if column.metric.higher_is_better else min)(scores, key=attrgetter("value"))


def _worst(column: ScoreColumn, scores: Sequence[Estimate]) -> Estimate:
    return (min if column.metric.higher_is_better else max)(scores, key=attrgetter("value"))


def _columns(tasks: Sequence[SuiteTask], suites: Sequence[Suite]) -> list[ScoreColumn]:
    names = {task.name for task in tasks}
    columns = []
    for suite in suites:
        columns += [
            ScoreColumn(suite.name, task.name, metric, headline=i == 0)
            for task in suite.tasks
            if task.name in names
            for i, metric in enumerate(task.metrics)
        ]
        columns += [
            ScoreColumn(suite.name, average.name, SuiteMetric(average.metric), headline=True)
            for average in suite.averages
            if names.issuperset(average.tasks)
        ]
    return columns


def _scores_of(
    samples: Mapping[str, Any], tasks: Sequence[SuiteTask], suites: Sequence[Suite]
) -> dict[tuple[str, str], Estimate]:
    """Scores by task (or average) and metric."""
    by_task = {task.name: task_estimates(task, samples[task.name].samples) for task in tasks}
    found = {(task, name): item for task, some in by_task.items() for name, item in some.items()}
    for suite in suites:
        for average in suite.averages:
            mean = average_estimate(average, by_task)
            if mean is not None:
                found[average.name, average.metric] = mean
    return found


def _row(
    name: str,
    members: Sequence[Candidate],
    each: Mapping[str, Mapping[tuple[str, str], Estimate]],
    columns: Sequence[ScoreColumn],
    choose: _Chooser,
) -> ModelRow:
    found: dict[ScoreColumn, dict[int | None, Estimate]] = {}
    for column in columns:
        key = (column.task, column.metric.name)
        by_seed: dict[int | None, list[Estimate]] = {}
        for member in members:
            if key in each[member.name]:
                by_seed.setdefault(member.seed, []).append(each[member.name][key])
        if by_seed:
            found[column] = {seed: choose(column, some) for seed, some in by_seed.items()}
    scores = {column: over_seeds(list(some.values())) for column, some in found.items()}
    spread = {
        column: stdev(item.value for item in some.values())
        for column, some in found.items()
        if len(some) > 1
    }
    return ModelRow(name, found, scores, spread, len(members))
