"""Common parts of local training: arguments of transformers' Trainer, and one run of it."""

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fedllm_flwr.config.schema import TrainingConfig
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.training.batches import RoundBatches
from fedllm_flwr.training.trainer_library import PrinterCallback, Trainer, TrainingArguments

_ADAMW = {False: "adamw_torch", True: "adamw_torch_fused"}  # by whether it runs on CUDA

Penalty = Callable[[], torch.Tensor | None]
"""A term of the loss that depends only on the adapter, if there is one."""


@dataclass(frozen=True)
class Trained:
    """Result of local training: the mean loss over the optimizer steps, and their number.

    ``metrics`` are further means over the round, by name.
    """

    loss: float
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class BareTrainer(Trainer):
    """transformers' Trainer, whose steps may be shared by several processes.

    It has no FLOP count, which walks over all modules in every step.

    Args:
        batches: this process's share of the round.
        penalty: an additional term of a step's loss, which is clipped with it but not reported.
    """

    def __init__(self, batches: RoundBatches, penalty: Penalty, **arguments: Any) -> None:
        super().__init__(train_dataset=batches, **arguments)
        self.group = batches.group
        self._penalty = penalty

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and the number of labels in those of all processes."""
        samples, labels = super().get_batch_samples(*arguments)
        if labels is None or self.group.size == 1:
            return samples, labels
        return samples, self.group.sum(torch.as_tensor(labels))

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """A forward and backward pass; after the step's last, the gradient is that of all."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.group.sum_gradients([p for p in model.parameters() if p.requires_grad])
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """A micro-batch's share of the sum over the step."""
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        assert isinstance(loss, torch.Tensor)  # no outputs were requested
        return with_penalty(loss, self._penalty, 1 / self.args.gradient_accumulation_steps)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: operations are not counted."""
        return 0


def with_penalty(loss: torch.Tensor, penalty: Penalty, share: float) -> torch.Tensor:
    """`loss` plus the gradient of `share` times the penalty; the value of `loss` is unchanged."""
    term = penalty()
    return loss if term is None else loss + share * (term - term.detach())


def training_arguments(
    model: AdaptedModel,
    batches: RoundBatches,
    training: TrainingConfig,
    learning_rate: float,
    seed: int,
) -> TrainingArguments:
    """Arguments for one round: new optimizer, constant learning rate, no files and no logs."""
    on_cuda = model.device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # required by the Trainer; nothing is written there
        per_device_train_batch_size=1,
        gradient_accumulation_steps=batches.per_step,
        max_steps=batches.num_steps,
        train_sampling_strategy="sequential",
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        optim="sgd" if training.optimizer == "sgd" else _ADAMW[on_cuda],
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
        dataloader_pin_memory=on_cuda,
        average_tokens_across_devices=False,
        logging_nan_inf_filter=False,  # a diverged client's loss is NaN, not the last good one
    )
    if arguments.n_gpu > 1:  # a client uses one device: no DataParallel
        arguments._n_gpu = 1
    return arguments


def run(trainer: BareTrainer, model: AdaptedModel) -> Trained:
    """Train, and restore the model for the next round's Trainer.

    A Trainer starts with a full garbage collection. It takes half a second if it walks over all
    objects of the libraries, and less than a millisecond while these are frozen (`gc.freeze`).
    """
    trainer.remove_callback(PrinterCallback)
    gc.freeze()
    try:
        result = trainer.train()
    finally:
        gc.unfreeze()
        trainer.accelerator.unwrap_model(model.peft, keep_fp32_wrapper=False)
        if trainer.args.gradient_checkpointing:
            model.peft.get_base_model().gradient_checkpointing_disable()
    loss = trainer.group.sum(torch.tensor(result.training_loss, dtype=torch.double))
    return Trained(loss=float(loss), steps=int(result.global_step))


def _checkpointing(model: AdaptedModel, training: TrainingConfig) -> dict[str, Any]:
    if not model.gradient_checkpointing(training.gradient_checkpointing):
        return {"gradient_checkpointing": False}
    return {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }


@contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off: the reference has none, and dropout noise would bias the log-ratios."""
    before = {m: m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    try:
        for module in before:
            module.p = 0.0
        yield
    finally:
        for module, p in before.items():
            module.p = p
