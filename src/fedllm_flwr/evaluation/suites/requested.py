"""The suites of a run's configuration, checked before a model is loaded."""

import importlib.metadata
from pathlib import Path

from fedllm_flwr.config import Config
from fedllm_flwr.errors import ConfigError, ModelError
from fedllm_flwr.evaluation.suites.catalogue import SuiteTask, chosen_suites
from fedllm_flwr.evaluation.suites.local_data import missing_files


def harness_version() -> str:
    """The harness' version.

    Raises:
        ModelError: it is not installed.
    """
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            "evaluation suites need lm-evaluation-harness: pip install 'fedllm-flwr[eval]'."
        ) from None


def requested_tasks(config: Config) -> list[SuiteTask]:
    """The tasks of ``evaluation.suites`` whose files are available; empty without a suite.

    Raises:
        ConfigError: a suite is unknown or not available during training, or no files are found.
        ModelError: the harness is not installed.
    """
    names = config.evaluation.suites
    if not names:
        return []
    tasks = [task for suite in chosen_suites(names, "evaluation.suites=") for task in suite.tasks]
    for task in tasks:
        if task.runner != "harness":
            raise ConfigError(
                f"evaluation.suites: {task.suite} runs code or uses a judge, which is not possible "
                "during training; use fedllm evaluate on the finished run."
            )
    harness_version()
    root = config.evaluation.data_root
    if root is None:
        return tasks
    found = [task for task in tasks if not missing_files(task, Path(root).expanduser())]
    if not found:
        raise ConfigError(
            f"evaluation.data_root={root}: holds the files of no task of {', '.join(names)}; "
            "fedllm evaluate --list shows them."
        )
    return found
