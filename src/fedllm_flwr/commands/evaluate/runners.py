"""Runners: the function that scores a suite's tasks, by the name in ``suite.yaml``."""

from collections.abc import Callable, Sequence
from functools import cache

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.evaluation.suites.catalogue import SuiteTask
from fedllm_flwr.evaluation.suites.samples import RunOptions, Samples
from fedllm_flwr.evaluation.suites.suite_model import TextModel

Runner = Callable[[SuiteTask, TextModel, RunOptions], Samples]


@cache
def _harness() -> Runner:
    from fedllm_flwr.evaluation.suites.harness import HarnessTasks

    return HarnessTasks().run


def _open_ended() -> Runner:
    from fedllm_flwr.evaluation.judging.open_ended import run_open_ended_task

    return run_open_ended_task


def _code() -> Runner:
    from fedllm_flwr.evaluation.coding.code_suite import run_code_task

    return run_code_task


# Functions that import what they need when they are called.
RUNNERS: dict[str, Callable[[], Runner]] = {
    "harness": _harness,
    "open_ended": _open_ended,
    "code": _code,
}


def runner_of(task: SuiteTask) -> Runner:
    """The function that scores a task."""
    if task.runner not in RUNNERS:
        raise ConfigError(f"task {task.name}: no such runner: {task.runner}.")
    return RUNNERS[task.runner]()


def why_not(task: SuiteTask, options: RunOptions) -> str | None:
    """Option that a task needs and that is missing; None if there is none."""
    if task.runner == "open_ended":
        from fedllm_flwr.evaluation.judging.open_ended import what_lacks

        return what_lacks(task.name, options)
    return None


def check_runners(tasks: Sequence[SuiteTask], options: RunOptions) -> None:
    """Refuse options that a runner cannot work with, before a model is loaded.

    Raises:
        FedLLMError: names the option and the remedy.
    """
    open_ended = [task for task in tasks if task.runner == "open_ended"]
    if open_ended:
        from fedllm_flwr.evaluation.judging.open_ended import check

        check(open_ended, options)
    if any(task.runner == "code" for task in tasks):
        from fedllm_flwr.evaluation.coding.code_suite import check_options

        check_options(options)


def closing_lines(samples: Sequence[Samples]) -> list[str]:
    """Closing lines of a runner about everything it did."""
    if any("judge" in item.notes for item in samples):
        from fedllm_flwr.evaluation.judging.open_ended import usage_line

        return [usage_line([item.notes for item in samples if "judge" in item.notes])]
    return []
