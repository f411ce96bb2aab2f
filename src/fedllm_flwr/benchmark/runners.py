"""Who scores which kind of task: the ``runner`` of a suite, by name."""

from collections.abc import Callable
from functools import cache

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.suites.catalogue import SuiteTask
from fedllm_flwr.suites.model import TextModel
from fedllm_flwr.suites.results import RunOptions, Samples

Runner = Callable[[SuiteTask, TextModel, RunOptions], Samples]


@cache
def _harness() -> Runner:
    from fedllm_flwr.suites.harness import HarnessTasks

    return HarnessTasks().run


# Functions that import what they need when they are called.
RUNNERS: dict[str, Callable[[], Runner]] = {"harness": _harness}


def runner_of(task: SuiteTask) -> Runner:
    """The function that scores a task."""
    if task.runner not in RUNNERS:
        raise ConfigError(f"task {task.name}: no such runner: {task.runner}.")
    return RUNNERS[task.runner]()
