"""Rows of the comparison: scores of every model on every task, and paired differences."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm_flwr.benchmark.candidates import BASE, Candidate
from fedllm_flwr.benchmark.scoring import Scored
from fedllm_flwr.suites.catalogue import Suite, SuiteTask
from fedllm_flwr.suites.scores import average_estimate, task_estimates
from fedllm_flwr.suites.statistics import Estimate, mean_of

LOCAL = "local"
_Chooser = Callable[[Sequence[Estimate]], Estimate]


@dataclass(frozen=True)
class Column:
    """One number of the comparison: a metric of a task, or an average over tasks."""

    suite: str
    task: str
    metric: str
    chance: float | None = None
    higher_is_better: bool = True
    unit: bool = True
    headline: bool = False


@dataclass(frozen=True)
class Row:
    """One model, or the mean over the models of one name (seeds, clients)."""

    name: str
    scores: Mapping[Column, Estimate]
    spread: Mapping[Column, float]  # standard deviation over seeds, where there are several
    num_models: int = 1


@dataclass(frozen=True)
class Comparison:
    """All rows of one evaluation."""

    columns: list[Column]
    rows: list[Row]

    def difference(self, row: Row, column: Column, to: str) -> Estimate | None:
        """A row's score minus that of another row, on the same examples."""
        other = next((item for item in self.rows if item.name == to), None)
        if other is None or other is row or row.name.startswith(" "):
            return None
        if column not in row.scores or column not in other.scores:
            return None
        return row.scores[column].minus(other.scores[column])


def compare_scores(
    candidates: Sequence[Candidate],
    scored: Scored,
    tasks: Sequence[SuiteTask],
    suites: Sequence[Suite],
) -> Comparison:
    """Scores of all candidates, those of one row averaged; clients first, then seeds."""
    columns = _columns(tasks, suites)
    each = {item.name: _scores_of(scored[item.name], tasks, suites) for item in candidates}
    rows = []
    for name in dict.fromkeys(item.row for item in candidates):
        members = [item for item in candidates if item.row == name]
        rows.append(_row(name, members, each, columns, mean_of))
        if any(item.client for item in members):
            for label, choose in (("  best client", max), ("  worst client", min)):
                rows.append(_row(label, members, each, columns, _extreme(choose)))
    return Comparison(columns, rows)


def _columns(tasks: Sequence[SuiteTask], suites: Sequence[Suite]) -> list[Column]:
    names = {task.name for task in tasks}
    columns = []
    for suite in suites:
        for task in suite.tasks:
            if task.name in names:
                for i, metric in enumerate(task.metrics):
                    better, chance = metric.higher_is_better, metric.chance
                    columns.append(
                        Column(
                            suite.name, task.name, metric.name, chance, better, metric.unit, i == 0
                        )
                    )
        columns += [
            Column(suite.name, average.name, average.metric, headline=True)
            for average in suite.averages
            if names.issuperset(average.tasks)
        ]
    return columns


def _scores_of(
    samples: Mapping[str, Any], tasks: Sequence[SuiteTask], suites: Sequence[Suite]
) -> dict[tuple[str, str], Estimate]:
    """By task (or average) and metric."""
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
    columns: Sequence[Column],
    choose: _Chooser,
) -> Row:
    scores, spread = {}, {}
    seeds = list(dict.fromkeys(item.seed for item in members))
    for column in columns:
        key = (column.task, column.metric)
        by_seed = [
            choose([each[m.name][key] for m in members if m.seed == seed and key in each[m.name]])
            for seed in seeds
            if any(key in each[m.name] for m in members if m.seed == seed)
        ]
        if by_seed:
            scores[column] = mean_of(by_seed)
        if len(by_seed) > 1:
            values = [item.value for item in by_seed]
            mean = sum(values) / len(values)
            spread[column] = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return Row(name, scores, spread, len(members))


def _extreme(choose: Callable[..., Estimate]) -> _Chooser:
    return lambda items: choose(items, key=lambda item: item.value)


def is_reference(name: str) -> bool:
    """Whether other rows are compared with this one."""
    return name in (BASE, LOCAL)
