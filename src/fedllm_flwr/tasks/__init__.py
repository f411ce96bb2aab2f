"""Training tasks by name: what is learnt, from which records, and how it is scored."""

from functools import cache

from fedllm_flwr.config import Config
from fedllm_flwr.plugins import TASKS
from fedllm_flwr.tasks.base import TrainingTask


def names() -> tuple[str, ...]:
    """Values of ``task.name``."""
    return tuple(TASKS.names())


@cache
def find(name: str) -> TrainingTask:
    """The entry of the task `name`; neither this nor its declarations import torch."""
    entry: TrainingTask = TASKS.find(name)()
    return entry


def task_of(config: Config) -> TrainingTask:
    """The entry of a configuration's task."""
    return find(config.task.name)
