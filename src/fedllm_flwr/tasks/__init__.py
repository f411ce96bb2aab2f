"""Training tasks by name: what is learnt, from which records, and how it is scored."""

from functools import cache

from fedllm_flwr.config import Config
from fedllm_flwr.plugins import TASKS
from fedllm_flwr.tasks.base import Metric, TrainingTask


def names() -> tuple[str, ...]:
    """Values of ``task.name``."""
    return tuple(TASKS.names())


@cache
def find(name: str) -> TrainingTask:
    """The entry of the task `name`; neither this nor its declarations import torch.

    Raises:
        ConfigError: there is no such task.
    """
    entry: TrainingTask = TASKS.find(name)()
    return entry


def task_of(config: Config) -> TrainingTask:
    """The entry of a configuration's task."""
    return find(config.task.name)


def all_metrics() -> dict[str, Metric]:
    """The scores of all tasks by name, in the order of tables."""
    return {metric.name: metric for name in names() for metric in find(name).metrics}


def table_metrics() -> list[str]:
    """Names of the scores that tables of several runs show."""
    return [name for name, metric in all_metrics().items() if metric.title]
