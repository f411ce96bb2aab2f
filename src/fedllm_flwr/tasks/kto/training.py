"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306) on one client's answers.

With the implied reward r = log pi(y|x) / pi_ref(y|x) and the reference point z0, an estimate of
KL(pi || pi_ref), an answer's loss is (equation 7)

    lambda_D (1 - sigma(beta (r - z0)))   if it is desirable,
    lambda_U (1 - sigma(beta (z0 - r)))   if it is not.

z0 is the mean of the implied rewards of mismatched answers, but at least 0: each prompt of the step
is paired with the previous example's answer. It is estimated on all examples of an optimizer step
with the adapter before the step, and has no gradient.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedllm_flwr.models.scoring import score_examples, trained_log_probs
from fedllm_flwr.params import Params
from fedllm_flwr.tasks.base import LocalWork
from fedllm_flwr.tasks.kto.held_out import answer_scores
from fedllm_flwr.tasks.kto.losses import kto_loss, reference_point
from fedllm_flwr.tasks.preferences.reference import LogProbs, reference_log_probs
from fedllm_flwr.tasks.preferences.training import AnswerRows, Answers, train_on_answers
from fedllm_flwr.training.batches import MicroBatch
from fedllm_flwr.training.private import ExampleLosses
from fedllm_flwr.training.trainer import Penalty, Trained
from fedllm_flwr.training.trainer_library import TrainerCallback


def mismatched_reference(work: LocalWork, reference: Params | None) -> LogProbs:
    """log p_ref of the mismatched answers of the round's steps, (steps, examples per step)."""
    found = [
        reference_log_probs(
            work.model,
            reference,
            work.examples.mismatched(step, work.config.training.max_length),
            work.config.evaluation.batch_tokens,
        )
        for step in _steps(work)
    ]
    return np.stack(found)


def answer_losses(work: LocalWork, reference: LogProbs) -> ExampleLosses:
    """Per-answer losses with z0 = 0, since estimating z0 would mix the examples of a step.

    Args:
        reference: as `train_kto` takes it.
    """

    def losses(batch: MicroBatch) -> Tensor:
        log_probs, _ = trained_log_probs(work.model, work.examples.rows, batch)
        given = torch.from_numpy(reference[batch, 0]).to(log_probs.device)
        wanted = torch.from_numpy(work.examples.desirable[batch]).to(log_probs.device)
        return kto_loss(log_probs.sum(1) - given, wanted, 0.0, work.config.kto)

    return losses


def train_kto(
    work: LocalWork,
    reference: LogProbs,
    mismatched: LogProbs,
    callbacks: list[TrainerCallback],
    penalty: Penalty,
) -> Trained:
    """Train the adapter in place, see `train_on_answers`; dropout is off, as in the reference.

    Args:
        reference: log p_ref of the answers, set for the drawn ones, (answers, 1).
        mismatched: the result of `mismatched_reference`.

    Returns:
        The loss; over the round's answers at the time of their step, the ``accuracy`` and
        ``margin`` of `answer_scores`; and ``kl``, the mean of the reference points.
    """
    config, model, desirable = work.config, work.model, work.examples.desirable
    steps, per_step = _steps(work), work.batches.per_step
    points: list[float] = []
    trained_on: list[MicroBatch] = []
    ratios: list[Tensor] = []

    def loss(answers: Answers, batch: MicroBatch) -> Tensor:
        if len(trained_on) % per_step == 0:
            number = len(trained_on) // per_step
            rows = work.examples.mismatched(steps[number], config.training.max_length)
            scores = score_examples(model, rows, config.evaluation.batch_tokens)
            model.peft.train()
            points.append(reference_point(scores.log_probs, mismatched[number]))
        ratio = answers.log_probs - answers.reference
        trained_on.append(batch)
        ratios.append(ratio.detach())
        wanted = torch.from_numpy(desirable[batch]).to(ratio.device)
        return kto_loss(ratio, wanted, points[-1], config.kto).mean()

    trained = train_on_answers(
        model,
        AnswerRows(work.examples.rows, 1, reference),
        work.batches,
        loss,
        config.training,
        work.learning_rate,
        work.seed,
        callbacks,
        penalty,
        disable_dropout=True,
    )
    group = work.batches.group
    rewards = config.kto.beta * group.gather(torch.cat(ratios).double().cpu()).numpy()
    answers = group.gather(torch.from_numpy(np.concatenate(trained_on))).numpy()
    metrics = answer_scores(rewards, desirable[answers])
    shown = {name: metrics[name] for name in ("accuracy", "margin") if name in metrics}
    return Trained(trained.loss, trained.steps, {**shown, "kl": float(np.mean(points))})


def _steps(work: LocalWork) -> NDArray[np.int64]:
    """The examples of each optimizer step in drawing order, (steps, examples per step)."""
    return work.drawn.reshape(work.batches.num_steps, -1)
