"""Direct preference optimisation (Rafailov et al. 2023) of the adapter on one client's pairs.

The reference model's log-probabilities are given: the reference stays the same for the whole run,
so that they are computed once per client.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fedllm_flwr.config.schema import DpoConfig as DpoSettings
from fedllm_flwr.config.schema import TrainingConfig
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.inputs import IGNORED, collate_padded, needed_logits
from fedllm_flwr.models.scoring import token_log_probs
from fedllm_flwr.tasks.dpo.losses import LOSSES, ScoredPairs, share_above_zero
from fedllm_flwr.tasks.dpo.pairs import EncodedPairs
from fedllm_flwr.tasks.preferences.reference import LogProbs
from fedllm_flwr.training.batches import MicroBatch, RoundBatches
from fedllm_flwr.training.trainer import (
    BareTrainer,
    Penalty,
    Trained,
    run,
    training_arguments,
    with_penalty,
)


def train_dpo(
    model: AdaptedModel,
    pairs: EncodedPairs,
    reference: LogProbs,
    batches: RoundBatches,
    dpo: DpoSettings,
    training: TrainingConfig,
    learning_rate: float,
    seed: int,
    callbacks: list[TrainerCallback],
    penalty: Penalty = lambda: None,
) -> Trained:
    """Train the adapter in place, one optimizer step per ``batches.per_step`` micro-batches.

    The loss of a step is the mean over its pairs, however they are divided into micro-batches,
    except for losses that are no mean over pairs (aot, aot_unpaired and the SFT term), which are
    taken of each micro-batch. The optimizer is fresh, the learning rate constant.

    Args:
        reference: log p_ref of chosen and rejected answers of the drawn pairs, (pairs, 2).

    Returns:
        Loss, and over the round's pairs, as they were when trained on: ``accuracy``, the share
        whose chosen answer has the higher reward, ties counting half, and ``margin``, the mean
        difference of the rewards beta log pi / pi_ref.
    """
    trainer = PreferenceTrainer(
        dpo,
        batches,
        model.selects_logits,
        penalty,
        model=model.peft,
        args=training_arguments(model, batches, training, learning_rate, seed),
        train_dataset=batches,
        data_collator=lambda items: _collate(model, pairs, reference, items[0]),
        callbacks=callbacks,
    )
    with _without_dropout(model.peft) if dpo.disable_dropout else nullcontext():
        trained = run(trainer, model)
    margins = torch.cat(trainer.margins).double().cpu().numpy()
    metrics = {"accuracy": share_above_zero(margins), "margin": float(margins.mean())}
    return Trained(trained.loss, trained.steps, metrics)


class PreferenceTrainer(BareTrainer):
    """Minimises a loss of pairs, whose rows are the chosen answers and then the rejected ones.

    ``margins`` are those of the pairs so far: differences of their rewards.
    """

    def __init__(
        self,
        dpo: DpoSettings,
        batches: RoundBatches,
        selects_logits: bool,
        penalty: Penalty,
        **arguments: Any,
    ) -> None:
        super().__init__(penalty, **arguments)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, to be divided by per_step
        self.margins: list[Tensor] = []  # of each micro-batch's pairs, in order
        self._dpo = dpo
        self._batches = batches
        self._selects_logits = selects_logits

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """A micro-batch's share of the mean over the step's pairs, times ``per_step``."""
        reference = inputs.pop("reference")  # (2 * pairs,)
        labels = inputs.pop("labels")  # (2 * pairs, longest)
        wanted = labels[:, 1:]
        if self._selects_logits:
            needed = needed_logits({"labels": labels})
            wanted, inputs["logits_to_keep"] = needed["shift_labels"], needed["logits_to_keep"]
        logits = model(**inputs, use_cache=False).logits[:, : wanted.shape[1]]
        log_probs = token_log_probs(logits, wanted)
        tokens = (wanted != IGNORED).sum(1)
        scored = ScoredPairs(*log_probs.sum(1).chunk(2), *reference.chunk(2), *tokens.chunk(2))
        beta, num_pairs = self._dpo.beta, len(labels) // 2
        loss = LOSSES[self._dpo.loss_type](scored, beta, self._dpo.label_smoothing).mean()
        if self._dpo.sft_weight:
            chosen = log_probs[:num_pairs].sum() / tokens[:num_pairs].sum()
            loss = loss - self._dpo.sft_weight * chosen
        self.margins.append(beta * scored.h.detach())
        share = num_pairs * self._batches.per_step / self._batches.items_per_step
        return with_penalty(loss * share, self._penalty, 1.0)


def _collate(
    model: AdaptedModel, pairs: EncodedPairs, reference: LogProbs, batch: MicroBatch
) -> dict[str, Tensor]:
    """The rows of the chosen answers, then those of the rejected ones; ``reference`` likewise."""
    rows = [2 * i for i in batch] + [2 * i + 1 for i in batch]
    inputs = collate_padded(pairs.rows, rows, model.pad_id)
    return {**inputs, "reference": torch.from_numpy(reference[batch]).T.flatten()}


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout off while training: the reference has none, and noise would pass for preference."""
    before = {m: m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    try:
        for module in before:
            module.p = 0.0
        yield
    finally:
        for module, p in before.items():
            module.p = p
