"""The registry of training tasks: supervised and preference objectives by name."""

from functools import cache

from fedllm_flwr.config import Config
from fedllm_flwr.plugins import TASKS
from fedllm_flwr.tasks.base import Metric, TrainingTask


def names() -> tuple[str, ...]:
    """Values of ``task.name``."""
    return tuple(TASKS.names())


@cache
def find(name: str) -> TrainingTask:
    """The task `name`; looking it up does not import torch.

    Raises:
        ConfigError: no installed task has this name.
    """
    entry: TrainingTask = TASKS.find(name)()
    return entry


def task_of(config: Config) -> TrainingTask:
    """The task of a configuration."""
    return find(config.task.name)


def all_metrics() -> dict[str, Metric]:
    """The metrics of all tasks by name, in table order."""
    return {metric.name: metric for name in names() for metric in find(name).metrics}


def table_metrics() -> list[str]:
    """Names of the metrics that comparison tables show."""
    return [name for name, metric in all_metrics().items() if metric.title]
