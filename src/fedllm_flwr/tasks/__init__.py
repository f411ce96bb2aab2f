"""Training tasks by name: what is learnt, from which records, and how it is scored."""

from functools import cache
from importlib import import_module

from fedllm_flwr.config import Config
from fedllm_flwr.tasks.base import TrainingTask

_ENTRIES = {"sft": "fedllm_flwr.tasks.sft:Sft", "dpo": "fedllm_flwr.tasks.dpo:Dpo"}


def names() -> tuple[str, ...]:
    """Values of ``task.name``."""
    return tuple(_ENTRIES)


@cache
def find(name: str) -> TrainingTask:
    """The entry of the task `name`; neither this nor its declarations import torch."""
    module, _, attribute = _ENTRIES[name].partition(":")
    entry: TrainingTask = getattr(import_module(module), attribute)()
    return entry


def task_of(config: Config) -> TrainingTask:
    """The entry of a configuration's task."""
    return find(config.task.name)
