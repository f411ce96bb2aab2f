"""Direct preference optimisation (Rafailov et al. 2023) of the adapter on one client's pairs.

The reference model is fixed for the whole run, so its log-probabilities are computed once per
client and passed in.
"""

import torch
from torch import Tensor

from fedllm_flwr.config.schema import DpoConfig, TrainingConfig
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.scoring import trained_log_probs
from fedllm_flwr.tasks.base import LocalWork
from fedllm_flwr.tasks.dpo.losses import LOSSES, ScoredPairs, share_above_zero
from fedllm_flwr.tasks.dpo.pairs import EncodedPairs
from fedllm_flwr.tasks.preferences.reference import LogProbs
from fedllm_flwr.tasks.preferences.training import AnswerRows, Answers, train_on_answers
from fedllm_flwr.training.batches import MicroBatch, RoundBatches
from fedllm_flwr.training.private import ExampleLosses
from fedllm_flwr.training.trainer import Penalty, Trained
from fedllm_flwr.training.trainer_library import TrainerCallback


def pair_losses(work: LocalWork, reference: LogProbs) -> ExampleLosses:
    """Per-pair losses, for all of `LOSSES` that do not sort their pairs.

    The SFT term is the mean over a pair's own tokens. The caller switches dropout off.

    Args:
        reference: as `train_dpo` takes it.
    """
    dpo = work.config.dpo

    def losses(batch: MicroBatch) -> Tensor:
        rows = [2 * i + side for side in (0, 1) for i in batch]
        log_probs, tokens = trained_log_probs(work.model, work.examples.rows, rows)
        given = torch.from_numpy(reference[batch]).T.flatten().to(log_probs.device)
        parts = (log_probs.sum(1), given, tokens)
        scored = ScoredPairs(*(part for row in parts for part in row.chunk(2)))
        values = LOSSES[dpo.loss_type](scored, dpo.beta, dpo.label_smoothing)
        return values - dpo.sft_weight * scored.chosen / scored.chosen_tokens

    return losses


def train_dpo(
    model: AdaptedModel,
    pairs: EncodedPairs,
    reference: LogProbs,
    batches: RoundBatches,
    dpo: DpoConfig,
    training: TrainingConfig,
    learning_rate: float,
    seed: int,
    callbacks: list[TrainerCallback],
    penalty: Penalty = lambda: None,
) -> Trained:
    """Train the adapter in place, see `train_on_answers`.

    Losses that are not a mean over pairs (aot, aot_unpaired and the SFT term) are computed per
    micro-batch.

    Args:
        reference: log p_ref of chosen and rejected answers of the drawn pairs, (pairs, 2).

    Returns:
        The loss and, over the round's pairs at the time of their step: ``accuracy``, the fraction
        whose chosen answer has the higher reward, ties counting half; and ``margin``, the mean
        difference of the rewards beta log pi / pi_ref.
    """
    margins: list[Tensor] = []  # one tensor per micro-batch, in order

    def loss(answers: Answers, batch: MicroBatch) -> Tensor:
        rows = answers.log_probs, answers.reference, answers.tokens
        scored = ScoredPairs(*(part for row in rows for part in row.chunk(2)))
        margins.append(dpo.beta * scored.h.detach())
        value = LOSSES[dpo.loss_type](scored, dpo.beta, dpo.label_smoothing).mean()
        if dpo.sft_weight:
            chosen = answers.token_log_probs[: len(batch)].sum() / scored.chosen_tokens.sum()
            value = value - dpo.sft_weight * chosen
        return value

    trained = train_on_answers(
        model,
        AnswerRows(pairs.rows, 2, reference),
        batches,
        loss,
        training,
        learning_rate,
        seed,
        callbacks,
        penalty,
        dpo.disable_dropout,
    )
    found = batches.group.gather(torch.cat(margins).double().cpu()).numpy()
    metrics = {"accuracy": share_above_zero(found), "margin": float(found.mean())}
    return Trained(trained.loss, trained.steps, metrics)
