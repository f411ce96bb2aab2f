"""A local optimisation: what a client's process trains, whether alone or with others."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch.nn import Parameter

from fedllm_flwr.federation.messages import FROZEN
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.params import Kept
from fedllm_flwr.tasks import task_of
from fedllm_flwr.tasks.base import LocalWork
from fedllm_flwr.training.drift import DriftCorrection
from fedllm_flwr.training.group import Group
from fedllm_flwr.training.local_terms import LocalTerms
from fedllm_flwr.training.private import train_privately
from fedllm_flwr.training.trainer import Trained


@dataclass(frozen=True)
class Optimisation:
    """A client's local optimisation from ``terms.start``, or one process's share of it.

    Attributes:
        prepared: what the task has made of the drawn examples, by kind of client memory.
        trained: names of the tensors to train; it replaces ``terms.trains``.
    """

    work: LocalWork
    prepared: Mapping[str, Kept]
    terms: LocalTerms
    trained: frozenset[str]

    def without_model(self) -> "Optimisation":
        """What another process needs, which has its own copy of the model."""
        nothing: Any = None
        terms = replace(self.terms, trains=None)
        return replace(self, work=replace(self.work, model=nothing), terms=terms)

    def share(self, model: AdaptedModel, group: Group) -> "Optimisation":
        """This process's share; each process draws its own dropout."""
        batches, seed = self.work.batches.share(group), self.work.seed + group.rank
        return replace(self, work=replace(self.work, model=model, batches=batches, seed=seed))

    def run(self) -> tuple[DriftCorrection, Trained]:
        """Train the model's adapter in place; return the drift correction and the metrics.

        Raises:
            FedLLMError: the model does not allow the requested training.
            PeerLost: another process of the group has ended.
        """
        work, task = self.work, task_of(self.work.config)
        model, group = work.model, work.batches.group
        model.load(self.terms.start, work.tensors.get(FROZEN))
        with _only(self.trained, model.trainable()) as parameters:
            drift = DriftCorrection(parameters, self.terms, work.learning_rate)
            # It depends on the adapter alone, so that one process adds it for all.
            penalty = drift.penalty if group.rank == 0 else lambda: None
            if work.config.privacy.unit == "record":
                return drift, train_privately(
                    model,
                    parameters,
                    task.example_losses(work, self.prepared),
                    work.examples.source,
                    work.batches,
                    work.config,
                    work.learning_rate,
                    work.seed,
                    task.rows_per_example,
                    task.drops_out(work.config),
                    [drift],
                    penalty,
                )
            return drift, task.optimise(work, self.prepared, [drift], penalty)


@contextmanager
def _only(
    trained: frozenset[str], parameters: dict[str, Parameter]
) -> Iterator[dict[str, Parameter]]:
    """The parameters named in `trained`, while all others are frozen."""
    frozen = {name: p for name, p in parameters.items() if name not in trained}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    try:
        yield {name: p for name, p in parameters.items() if name not in frozen}
    finally:
        for parameter in frozen.values():
            parameter.requires_grad_(True)
