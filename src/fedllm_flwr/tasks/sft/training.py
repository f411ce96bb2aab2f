"""Supervised fine-tuning of the adapter on one client's examples, by transformers' Trainer.

TRL's SFTTrainer computes entropies and token accuracies in every step. On small models it took 20
to 50 % more time than this bare Trainer, which is within a few percent of a plain PyTorch loop.
"""

from collections.abc import Callable

import torch

from fedllm_flwr.config.schema import TrainingConfig
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.errors import ModelError
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.inputs import collate_packed, collate_padded, needed_logits
from fedllm_flwr.training.batches import MicroBatch, RoundBatches
from fedllm_flwr.training.trainer import (
    BareTrainer,
    Penalty,
    Trained,
    run,
    training_arguments,
)
from fedllm_flwr.training.trainer_library import TrainerCallback

Collator = Callable[[list[MicroBatch]], dict[str, torch.Tensor]]


def train_sft(
    model: AdaptedModel,
    examples: Encoded,
    batches: RoundBatches,
    training: TrainingConfig,
    learning_rate: float,
    seed: int,
    callbacks: list[TrainerCallback],
    penalty: Penalty = lambda: None,
) -> Trained:
    """Train the adapter in place, one optimizer step per ``batches.per_step`` micro-batches.

    The loss of a step is the mean over all its supervised tokens, independent of their division
    into micro-batches. The optimizer is newly initialised and the learning rate is constant.

    Raises:
        ModelError: the model computes only batch means, which do not add up to the step's mean.
    """
    trainer = BareTrainer(
        batches,
        penalty,
        model=model.peft,
        args=training_arguments(model, batches, training, learning_rate, seed),
        data_collator=_collator(model, examples, batches.packed),
        callbacks=callbacks,
    )
    if not trainer.model_accepts_loss_kwargs:
        kind = type(model.peft.get_base_model()).__name__
        text = (
            f"{kind} cannot sum its loss over the micro-batches of a step; choose a model whose "
            "forward takes num_items_in_batch, as those of the common architectures do."
        )
        raise ModelError(text, text)
    return run(trainer, model)


def _collator(model: AdaptedModel, examples: Encoded, packed: bool) -> Collator:
    """A collator for a data set whose items are micro-batches; the loader passes one at a time."""
    selects_logits = model.selects_logits

    def collate(items: list[MicroBatch]) -> dict[str, torch.Tensor]:
        if packed:
            inputs = collate_packed(examples, items[0])
        else:
            inputs = collate_padded(examples, items[0], model.pad_id)
        return needed_logits(inputs) if selects_logits else inputs

    return collate
