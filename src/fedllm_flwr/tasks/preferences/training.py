"""Training with losses of whole answers' log-probabilities under policy and reference."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedllm_flwr.config.schema import TrainingConfig
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.inputs import IGNORED, collate_padded, needed_logits
from fedllm_flwr.models.scoring import token_log_probs
from fedllm_flwr.training.batches import MicroBatch, RoundBatches
from fedllm_flwr.training.trainer import (
    BareTrainer,
    Penalty,
    Trained,
    run,
    training_arguments,
    with_penalty,
    without_dropout,
)
from fedllm_flwr.training.trainer_library import TrainerCallback


@dataclass(frozen=True)
class Answers:
    """The rows of a micro-batch: the first rows of all examples, then their second rows."""

    token_log_probs: Tensor  # (rows, positions), with gradients; zero except at answer tokens
    tokens: Tensor  # number of tokens of each answer, (rows,)
    reference: Tensor  # log p_ref of each answer, (rows,)

    @property
    def log_probs(self) -> Tensor:
        """log p of each answer, (rows,)."""
        return self.token_log_probs.sum(1)


AnswersLoss = Callable[[Answers, MicroBatch], Tensor]
"""Mean loss of a micro-batch's examples."""


@dataclass(frozen=True)
class AnswerRows:
    """The training rows; each example has `per_example` consecutive rows."""

    rows: Encoded
    per_example: int
    reference: NDArray[np.float32]  # log p_ref, (examples, per_example)


def train_on_answers(
    model: AdaptedModel,
    examples: AnswerRows,
    batches: RoundBatches,
    loss: AnswersLoss,
    training: TrainingConfig,
    learning_rate: float,
    seed: int,
    callbacks: list[TrainerCallback],
    penalty: Penalty,
    disable_dropout: bool,
) -> Trained:
    """Train the adapter in place, one optimizer step per ``batches.per_step`` micro-batches.

    The loss of a step is the mean over its examples, independent of their division into
    micro-batches. The optimizer is newly initialised and the learning rate is constant.
    """

    def collate(items: Sequence[MicroBatch]) -> dict[str, Any]:
        batch, each = items[0], examples.per_example
        rows = [each * i + side for side in range(each) for i in batch]
        inputs = collate_padded(examples.rows, rows, model.pad_id)
        reference = torch.from_numpy(examples.reference[batch]).T.flatten()
        return {**inputs, "reference": reference, "batch": batch}

    trainer = AnswerTrainer(
        loss,
        batches,
        model.selects_logits,
        penalty,
        model=model.peft,
        args=training_arguments(model, batches, training, learning_rate, seed),
        data_collator=collate,
        callbacks=callbacks,
    )
    with without_dropout(model.peft) if disable_dropout else nullcontext():
        return run(trainer, model)


class AnswerTrainer(BareTrainer):
    """Minimises a loss of whole answers."""

    def __init__(
        self,
        loss: AnswersLoss,
        batches: RoundBatches,
        selects_logits: bool,
        penalty: Penalty,
        **arguments: Any,
    ) -> None:
        super().__init__(batches, penalty, **arguments)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which is divided by per_step
        self._loss = loss
        self._batches = batches
        self._selects_logits = selects_logits

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """A micro-batch's share of the mean over the step's examples, times ``per_step``."""
        reference, batch = inputs.pop("reference"), inputs.pop("batch")
        labels = inputs.pop("labels")  # (rows, longest)
        wanted = labels[:, 1:]
        if self._selects_logits:
            needed = needed_logits({"labels": labels})
            wanted, inputs["logits_to_keep"] = needed["shift_labels"], needed["logits_to_keep"]
        logits = model(**inputs, use_cache=False).logits[:, : wanted.shape[1]]
        log_probs = token_log_probs(logits, wanted)
        loss = self._loss(Answers(log_probs, (wanted != IGNORED).sum(1), reference), batch)
        share = len(batch) * self._batches.per_step / self._batches.items_per_step
        return with_penalty(loss * share, self._penalty, 1.0)
