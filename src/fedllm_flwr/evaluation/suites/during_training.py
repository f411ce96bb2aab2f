"""Suites scored on a few examples at each central evaluation of a run."""

from dataclasses import dataclass, field
from pathlib import Path

from fedllm_flwr.config import Config
from fedllm_flwr.evaluation.suites.catalogue import SuiteTask
from fedllm_flwr.evaluation.suites.harness import HarnessTasks
from fedllm_flwr.evaluation.suites.options import RunOptions
from fedllm_flwr.evaluation.suites.requested import requested_tasks
from fedllm_flwr.evaluation.suites.scores import task_estimates
from fedllm_flwr.evaluation.suites.suite_model import TextModel
from fedllm_flwr.models.adapted_model import AdaptedModel


@dataclass(frozen=True)
class CentralSuites:
    """Tasks scored at every central evaluation; their data are read once."""

    tasks: list[SuiteTask]
    template: str
    options: RunOptions
    harness: HarnessTasks = field(default_factory=HarnessTasks)

    def score(self, adapted: AdaptedModel) -> dict[str, float]:
        """Scores of the loaded adapter, by ``<suite>/<task>/<metric>``."""
        model = TextModel(adapted, template=self.template, batch_tokens=self.options.batch_tokens)
        scores = {}
        for task in self.tasks:
            found = task_estimates(task, self.harness.run(task, model, self.options).samples)
            for name, estimate in found.items():
                key = f"{task.suite}/{task.name}/{name.replace(' ', '_').lower()}"
                scores[key] = estimate.value
        return scores


def central_suites(config: Config) -> CentralSuites | None:
    """The suites of ``evaluation.suites``; None if it is empty.

    Tasks whose local files are missing are left out.

    Raises:
        ConfigError: a suite is unknown, or not scored by the harness.
        ModelError: the harness is not installed.
    """
    tasks = requested_tasks(config)
    if not tasks:
        return None
    root = config.evaluation.data_root
    options = RunOptions(
        subset=config.evaluation.suite_subset,
        data_root=None if root is None else Path(root).expanduser(),
        batch_tokens=config.evaluation.batch_tokens,
    )
    return CentralSuites(tasks, config.data.template, options)
