"""Scores of judged answers: implied rewards against the reference model."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import KtoConfig
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.scoring import score_examples
from fedllm_flwr.params import Params
from fedllm_flwr.tasks.base import Scores
from fedllm_flwr.tasks.kto.examples import EncodedAnswers
from fedllm_flwr.tasks.kto.losses import kto_loss, reference_point
from fedllm_flwr.tasks.preferences.answers import Prompts
from fedllm_flwr.tasks.preferences.reference import LogProbs, reference_log_probs


@dataclass(frozen=True)
class JudgedSet:
    """Held-out answers with the reference model's log-probabilities.

    Attributes:
        mismatched: each prompt with another prompt's answer, for the reference point.
        reference: log p_ref of the answers, (answers,).
        mismatched_reference: log p_ref of the mismatched answers, (answers,).
    """

    answers: EncodedAnswers
    mismatched: Encoded
    reference: LogProbs
    mismatched_reference: LogProbs
    kto: KtoConfig
    prompts: Prompts

    metrics = ("loss", "accuracy", "margin")

    @classmethod
    def of(
        cls,
        config: Config,
        model: AdaptedModel,
        answers: EncodedAnswers,
        reference: Params | None,
        prompts: Prompts,
    ) -> "JudgedSet":
        """Compute the reference log-probabilities; leaves the reference's adapter in the model.

        Args:
            reference: adapter of the reference model; None: the base model.
        """
        batch_tokens = config.evaluation.batch_tokens
        mixed = answers.mismatched(np.arange(len(answers)), config.training.max_length)
        own, others = (
            reference_log_probs(model, reference, rows, batch_tokens)
            for rows in (answers.rows, mixed)
        )
        return cls(answers, mixed, own, others, config.kto, prompts)

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def num_prompts(self) -> int:
        """Number of prompts that `side_by_side` answers."""
        return len(self.prompts.tokens)

    def side_by_side(self, model: AdaptedModel, params: Params, label: str) -> str:
        """The model's answers without and with the adapter `params`, and the desirable answers."""
        return self.prompts.side_by_side(model, params, label)

    def score(self, model: AdaptedModel, batch_tokens: int) -> Scores:
        """Scores of the model with its current adapter.

        These are `answer_scores`; ``loss``, KTO's loss with the reference point ``kl`` estimated on
        all answers; and ``answer_tokens``, the mean length of generated answers.
        """
        policy = score_examples(model, self.answers.rows, batch_tokens).log_probs
        mixed = score_examples(model, self.mismatched, batch_tokens).log_probs
        ratio = policy.astype(np.float64) - self.reference
        z0 = reference_point(mixed, self.mismatched_reference)
        desirable = self.answers.desirable
        loss = kto_loss(torch.from_numpy(ratio), torch.from_numpy(desirable), z0, self.kto)
        scores = {"loss": float(loss.mean()), **answer_scores(self.kto.beta * ratio, desirable)}
        scores["kl"] = z0
        if self.num_prompts:
            scores["answer_tokens"] = self.prompts.mean_tokens(model)
        return scores


def make_judged_set(
    config: Config,
    model: AdaptedModel,
    records: Any,
    answers: EncodedAnswers,
    reference: Params | None,
) -> JudgedSet:
    """Prepare held-out answers for scoring.

    Args:
        records: a data set with the fields messages and desirable.
        answers: the same records, encoded.
        reference: adapter of the reference model; None: the base model.
    """
    liked = answers.source[answers.desirable]
    prompts = Prompts.of(config, model, records, liked, "desirable")
    return JudgedSet.of(config, model, answers, reference, prompts)


def answer_scores(rewards: NDArray[np.float64], desirable: NDArray[np.bool_]) -> Scores:
    """Scores from rewards beta log pi / pi_ref, (answers,).

    ``accuracy`` is the fraction of answers whose reward has the right sign, ties counting half;
    ``margin`` is the mean reward of desirable answers minus that of undesirable ones. Scores of a
    kind of answer that does not occur are omitted.
    """
    right = np.where(desirable, rewards, -rewards)
    scores = {"accuracy": float(np.mean(0.5 + 0.5 * np.sign(right)))}
    means = {
        f"{name}_reward": float(rewards[chosen].mean())
        for name, chosen in (("desirable", desirable), ("undesirable", ~desirable))
        if chosen.any()
    }
    if len(means) == 2:
        scores["margin"] = means["desirable_reward"] - means["undesirable_reward"]
    return scores | means
