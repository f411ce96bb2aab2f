"""Direct preference optimisation (Rafailov et al. 2023) of the adapter on one client's pairs.

The losses are those of TRL's DPOTrainer. Its constructor is not used: it would copy the adapter
of the round as the reference, round a quantized model's adapter to bfloat16, tokenise anew and
patch the model's forward in every round. What its loss needs is set here instead, with
log-probabilities of the reference model that were computed before.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from fedllm_flwr.config.schema import DpoConfig as DpoSettings
from fedllm_flwr.config.schema import TrainingConfig
from fedllm_flwr.data.pairs import EncodedPairs
from fedllm_flwr.training.batches import (
    IGNORED,
    MicroBatch,
    RoundBatches,
    collate_padded,
    needed_logits,
)
from fedllm_flwr.training.log_probs import share_above_zero, token_log_probs
from fedllm_flwr.training.model import AdaptedModel
from fedllm_flwr.training.reference import LogProbs
from fedllm_flwr.training.trainer import (
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
    """
    arguments = training_arguments(
        DPOConfig, model, batches, training, learning_rate, seed, **_dpo_arguments(dpo)
    )
    trainer = _PreferenceTrainer(model, arguments, batches, pairs, reference, callbacks, penalty)
    with _without_dropout(model.peft) if dpo.disable_dropout else nullcontext():
        trained = run(trainer, model)
    return Trained(trained.loss, trained.steps, trainer.means())


def _dpo_arguments(dpo: DpoSettings) -> dict[str, Any]:
    """TRL's arguments of the loss; the SFT term is a second loss with a weight."""
    losses = [dpo.loss_type]
    return {
        "beta": dpo.beta,
        "loss_type": [*losses, "sft"] if dpo.sft_weight else losses,
        "loss_weights": [1.0, dpo.sft_weight] if dpo.sft_weight else None,
        "label_smoothing": dpo.label_smoothing,
    }


class _PreferenceTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's loss on micro-batches of pairs that are tokenised already."""

    def __init__(
        self,
        model: AdaptedModel,
        args: DPOConfig,
        batches: RoundBatches,
        pairs: EncodedPairs,
        reference: LogProbs,
        callbacks: list[TrainerCallback],
        penalty: Penalty,
    ) -> None:
        Trainer.__init__(
            self,
            model=model.peft,
            args=args,
            train_dataset=batches,
            data_collator=lambda items: _collate(model, pairs, reference, items[0]),
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean, to be divided by per_step
        self._batches = batches
        self._penalty = penalty
        self._scored = _AnswersOf(model)
        self._margins: list[torch.Tensor] = []  # of each micro-batch's pairs, in order
        for name in ("beta", "label_smoothing", "use_weighting", "ld_alpha"):
            setattr(self, name, getattr(args, name))
        self.f_divergence_type = args.f_divergence_type
        self.f_alpha_divergence_coef = args.f_alpha_divergence_coef
        self.loss_types: list[str] = args.loss_type
        self.loss_weights = args.loss_weights or [1.0] * len(self.loss_types)
        self.precompute_ref_logps = True
        self.ref_model = None
        self.aux_loss_enabled = False
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
        self._total_train_tokens = 0
        self._tp_size = 1

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """A micro-batch's share of the mean over the step's pairs, times ``per_step``."""
        loss: torch.Tensor = self._compute_loss(self._scored.through(model), inputs, False)
        chosen, rejected = self._scored.answers.chunk(2)
        of_reference = inputs["ref_chosen_logps"] - inputs["ref_rejected_logps"]
        self._margins.append(self.beta * (chosen - rejected - of_reference))
        num_pairs = len(inputs["input_ids"]) // 2
        share: float = num_pairs * self._batches.per_step / self._batches.items_per_step
        return with_penalty(loss * share, self._penalty, 1.0)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's own; TRL's adds the offloading of activations."""
        loss: torch.Tensor = Trainer.training_step(self, *args, **kwargs)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing is logged; `means` says what there is to say."""

    def means(self) -> dict[str, float]:
        """Reward accuracy and margin over the round's pairs, as they were when trained on."""
        margins = torch.cat(self._margins).double().cpu().numpy()
        return {"accuracy": share_above_zero(margins), "margin": float(margins.mean())}


class _AnswersOf:
    """Stands in for the model in TRL's loss: log-probabilities at the answers' tokens alone.

    TRL computes the logits of all positions on CPUs, and entropies and the like for its log,
    which are zero here.
    """

    def __init__(self, model: AdaptedModel) -> None:
        self._selects_logits = model.selects_logits
        self.answers = torch.zeros(0)  # log p of the last batch's answers, (rows,)

    def through(self, module: nn.Module) -> Any:
        """A callable with the signature that TRL uses."""

        def scored(labels: torch.Tensor, fused_lm_head: bool, **inputs: Any) -> SimpleNamespace:
            wanted, kept = labels[:, 1:], torch.arange(labels.shape[1] - 1)
            if self._selects_logits:
                chosen = needed_logits({"labels": labels})
                wanted, kept = chosen["shift_labels"], chosen["logits_to_keep"]
                inputs["logits_to_keep"] = kept
            logits = module(**inputs).logits[:, : wanted.shape[1]]
            nothing = torch.zeros(labels[:, 1:].shape, device=logits.device)
            log_probs = nothing.clone()
            log_probs[:, kept] = token_log_probs(logits, wanted)
            self.answers = log_probs.detach().sum(1)
            return SimpleNamespace(
                log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
            )

        return scored


def _collate(
    model: AdaptedModel, pairs: EncodedPairs, reference: LogProbs, batch: MicroBatch
) -> dict[str, torch.Tensor]:
    """TRL's inputs: the rows of the chosen answers, then those of the rejected ones."""
    rows = [2 * i for i in batch] + [2 * i + 1 for i in batch]
    inputs = collate_padded(pairs.rows, rows, model.pad_id)
    labels = inputs.pop("labels")
    chosen, rejected = torch.from_numpy(reference[batch]).unbind(1)
    return {
        **inputs,
        "completion_mask": (labels != IGNORED).long(),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }


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
