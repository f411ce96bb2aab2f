"""Metrics of a task and averages of a suite, from scored examples."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedllm_flwr.evaluation.suites.catalogue import Average, SuiteTask
from fedllm_flwr.evaluation.suites.samples import Sample
from fedllm_flwr.evaluation.suites.statistics import Estimate, estimate, mean_of

Estimates = dict[str, Estimate]  # by metric


def task_estimates(task: SuiteTask, samples: Sequence[Sample]) -> Estimates:
    """The metrics of a task that have examples."""
    found = {}
    for metric in task.metrics:
        values: list[object] = [
            sample[metric.column]
            for sample in samples
            if metric.column in sample
            and (not metric.parts or str(sample.get("part", "")) in metric.parts)
        ]
        if any(value is not None for value in values):
            purpose = " ".join([task.name, *metric.parts])
            found[metric.name] = estimate(metric.kind, values, purpose)
    return found


def average_estimate(average: Average, tasks: Mapping[str, Estimates]) -> Estimate | None:
    """The mean over an average's tasks; None if one of them is missing."""
    found = [tasks.get(name, {}).get(average.metric) for name in average.tasks]
    present = [item for item in found if item is not None]
    if len(present) < len(found):
        return None
    return replace(mean_of(present), num_examples=sum(item.num_examples for item in present))
