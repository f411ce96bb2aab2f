"""Supervised fine-tuning of the adapter on one client's examples, by transformers' Trainer.

TRL's SFTTrainer computes entropies and token accuracies in every step; on small models that took
20 to 50 % more time than this bare Trainer, which is within a few percent of a plain loop.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fedllm_flwr.config.schema import TrainingConfig
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.errors import ModelError
from fedllm_flwr.training.batches import (
    MicroBatch,
    RoundBatches,
    collate_packed,
    collate_padded,
    needed_logits,
)
from fedllm_flwr.training.model import AdaptedModel

Collator = Callable[[list[MicroBatch]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Trained:
    """Result of local training: the mean loss over the optimizer steps, and their number."""

    loss: float
    steps: int


class _Trainer(Trainer):
    """transformers' Trainer without its count of operations, which walks all modules each time."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted."""
        return 0


def train_sft(
    model: AdaptedModel,
    examples: Encoded,
    batches: RoundBatches,
    training: TrainingConfig,
    learning_rate: float,
    seed: int,
    packed: bool,
    callbacks: list[TrainerCallback],
) -> Trained:
    """Train the adapter in place, one optimizer step per ``batches.per_step`` micro-batches.

    The loss of a step is the sum over all its supervised tokens divided by their number, however
    they are divided into micro-batches. The optimizer is fresh, the learning rate constant.

    Raises:
        ModelError: the model computes only means over a batch, which do not add up to a step's.
    """
    steps = len(batches) // batches.per_step
    trainer = _Trainer(
        model=model.peft,
        args=_arguments(model, batches, training, learning_rate, steps, seed),
        train_dataset=batches,
        data_collator=_collator(model, examples, packed),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    if not trainer.model_accepts_loss_kwargs:
        kind = type(model.peft.get_base_model()).__name__
        raise ModelError(
            f"{kind} cannot sum its loss over the micro-batches of a step; choose a model whose "
            "forward takes num_items_in_batch, as those of the common architectures do."
        )
    try:
        result = trainer.train()
    finally:  # the next round's Trainer finds the model as this one did
        trainer.accelerator.unwrap_model(model.peft, keep_fp32_wrapper=False)
        if trainer.args.gradient_checkpointing:
            model.peft.get_base_model().gradient_checkpointing_disable()
    return Trained(loss=float(result.training_loss), steps=int(result.global_step))


def _collator(model: AdaptedModel, examples: Encoded, packed: bool) -> Collator:
    """Items of the data set are micro-batches; the loader hands them over one at a time."""
    selects_logits = model.selects_logits

    def collate(items: list[MicroBatch]) -> dict[str, torch.Tensor]:
        if packed:
            inputs = collate_packed(examples, items[0])
        else:
            inputs = collate_padded(examples, items[0], model.pad_id)
        return needed_logits(inputs) if selects_logits else inputs

    return collate


def _arguments(
    model: AdaptedModel,
    batches: RoundBatches,
    training: TrainingConfig,
    learning_rate: float,
    steps: int,
    seed: int,
) -> TrainingArguments:
    on_cuda = model.device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # the Trainer makes it; nothing is written there
        per_device_train_batch_size=1,
        gradient_accumulation_steps=batches.per_step,
        max_steps=steps,
        train_sampling_strategy="sequential",
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        optim="sgd" if training.optimizer == "sgd" else "adamw_torch",
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=on_cuda and model.dtype == torch.bfloat16,
        fp16=on_cuda and model.dtype == torch.float16,
        **_checkpointing(model, training),
        use_cpu=model.device.type == "cpu",
        seed=seed % 2**32,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        average_tokens_across_devices=False,
        logging_nan_inf_filter=False,  # a diverged client's loss is NaN, not the last good one
    )
    if arguments.n_gpu > 1:  # one client, one device: no DataParallel on a machine with several
        arguments._n_gpu = 1
    return arguments


def _checkpointing(model: AdaptedModel, training: TrainingConfig) -> dict[str, Any]:
    if not model.gradient_checkpointing(training.gradient_checkpointing):
        return {}
    return {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
