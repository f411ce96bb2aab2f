"""Scores of preference pairs: rewards against the reference model."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm_flwr.config import Config
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.scoring import score_examples
from fedllm_flwr.params import Params
from fedllm_flwr.tasks.base import Scores
from fedllm_flwr.tasks.dpo.losses import share_above_zero
from fedllm_flwr.tasks.dpo.pairs import EncodedPairs
from fedllm_flwr.tasks.preferences.answers import Prompts
from fedllm_flwr.tasks.preferences.reference import LogProbs, reference_log_probs


@dataclass(frozen=True)
class PreferenceSet:
    """Held-out pairs with the reference model's log-probabilities, (pairs, 2)."""

    pairs: EncodedPairs
    reference: LogProbs
    beta: float
    prompts: Prompts

    metrics = ("loss", "accuracy", "margin")

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def num_prompts(self) -> int:
        """Number of prompts that `side_by_side` answers."""
        return len(self.prompts.tokens)

    def side_by_side(self, model: AdaptedModel, params: Params, label: str) -> str:
        """The model's answers without and with the adapter `params`, and the chosen answers."""
        return self.prompts.side_by_side(model, params, label)

    def score(self, model: AdaptedModel, batch_tokens: int) -> Scores:
        """Scores of the model with its current adapter: `preference_scores` and ``answer_tokens``.

        ``answer_tokens`` is the mean length of generated answers, which preference optimisation
        tends to increase.
        """
        policy = score_examples(model, self.pairs.rows, batch_tokens).log_probs.reshape(-1, 2)
        scores = preference_scores(policy, self.reference, self.beta)
        if self.num_prompts:
            scores["answer_tokens"] = self.prompts.mean_tokens(model)
        return scores


def make_preference_set(
    config: Config,
    model: AdaptedModel,
    records: Any,
    pairs: EncodedPairs,
    reference: Params | None,
) -> PreferenceSet:
    """Prepare held-out pairs for scoring; computes the reference log-probabilities once.

    Args:
        records: a data set with the columns messages, chosen and rejected.
        pairs: the same records, encoded.
        reference: adapter of the reference model; None: the base model.
    """
    values = reference_log_probs(model, reference, pairs.rows, config.evaluation.batch_tokens)
    prompts = Prompts.of(config, model, records, pairs.source, "chosen")
    return PreferenceSet(pairs, values.reshape(-1, 2), config.dpo.beta, prompts)


def score_pairs(
    config: Config,
    model: AdaptedModel,
    pairs: EncodedPairs,
    params: Params,
    reference: Params | None,
) -> Scores:
    """`preference_scores` of the adapter `params` on a client's own pairs."""
    batch_tokens = config.evaluation.batch_tokens
    expected = reference_log_probs(model, reference, pairs.rows, batch_tokens).reshape(-1, 2)
    model.load(params)
    policy = score_examples(model, pairs.rows, batch_tokens).log_probs.reshape(-1, 2)
    return preference_scores(policy, expected, config.dpo.beta)


def preference_scores(policy: LogProbs, reference: LogProbs, beta: float) -> Scores:
    """Scores from log p of chosen and rejected answers, (pairs, 2), under both models.

    The reward of an answer is beta log(p / p_ref) (Rafailov et al. 2023). ``accuracy`` is the
    fraction of pairs whose chosen answer has the higher reward, ties counting half; ``margin`` the
    mean difference of the rewards; ``loss`` DPO's sigmoid loss, whatever loss is trained.
    ``likelihood_accuracy`` compares only log p, which depends on the answers' lengths.
    """
    log_probs = policy.astype(np.float64)
    rewards = beta * (log_probs - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    chosen, rejected = log_probs.mean(0)
    return {
        "loss": float(np.logaddexp(0.0, -margins).mean()),
        "accuracy": share_above_zero(margins),
        "margin": float(margins.mean()),
        "chosen_reward": float(rewards[:, 0].mean()),
        "rejected_reward": float(rewards[:, 1].mean()),
        "chosen_log_prob": float(chosen),
        "rejected_log_prob": float(rejected),
        "likelihood_accuracy": share_above_zero(log_probs[:, 0] - log_probs[:, 1]),
    }
