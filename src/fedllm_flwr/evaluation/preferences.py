"""Evaluation on held-out preference pairs: rewards against the reference model, and answers."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm_flwr.config import Config
from fedllm_flwr.data.encode import encode_prompts
from fedllm_flwr.data.pairs import EncodedPairs
from fedllm_flwr.data.tokens import TokenArray
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.device import torch_threads
from fedllm_flwr.models.generation import Decoding, as_text, generate
from fedllm_flwr.models.scoring import score_examples
from fedllm_flwr.params import Params
from fedllm_flwr.training.preference_losses import share_above_zero
from fedllm_flwr.training.reference import LogProbs, reference_log_probs

Scores = dict[str, float]


@dataclass(frozen=True)
class Prompts:
    """Held-out prompts that the model answers freely, and the better answers in the data."""

    texts: list[str]  # the last turn of each
    tokens: list[TokenArray]
    chosen: list[str]
    decoding: Decoding


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

    def score(self, model: AdaptedModel, batch_tokens: int) -> Scores:
        """Scores of the model as it is, those of `preference_scores` and ``answer_tokens``.

        The latter is the mean length of its free answers: optimising preferences tends to make
        them longer.
        """
        policy = score_examples(model, self.pairs.rows, batch_tokens).log_probs.reshape(-1, 2)
        scores = preference_scores(policy, self.reference, self.beta)
        if self.prompts.tokens:
            answers = generate(model, self.prompts.tokens, self.prompts.decoding)
            scores["answer_tokens"] = float(np.mean([len(answer) for answer in answers]))
        return scores


def make_preference_set(
    config: Config,
    model: AdaptedModel,
    records: Any,
    pairs: EncodedPairs,
    reference: Params | None,
    threads: int,
) -> PreferenceSet:
    """Put together what is needed to score adapters; computes the reference once.

    Args:
        records: a data set with the columns messages, chosen and rejected.
        pairs: the same records, encoded.
        reference: adapter of the reference model; None: the base model.
    """
    with torch_threads(threads):
        values = reference_log_probs(model, reference, pairs, config.evaluation.batch_tokens)
    return PreferenceSet(pairs, values, config.dpo.beta, _prompts(config, model, records, pairs))


def preference_scores(policy: LogProbs, reference: LogProbs, beta: float) -> Scores:
    """Scores from log p of chosen and rejected answers, (pairs, 2), under both models.

    The reward of an answer is beta log(p / p_ref) (Rafailov et al. 2023). ``accuracy`` is the
    share of pairs whose chosen answer has the higher reward, ties counting half; ``margin`` the
    mean difference of the rewards; ``loss`` the sigmoid loss of DPO, whatever loss is trained.
    ``likelihood_accuracy`` compares log p alone, which depends on the answers' lengths.
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


def _prompts(config: Config, model: AdaptedModel, records: Any, pairs: EncodedPairs) -> Prompts:
    """The first pairs' prompts, cut so that there is room for an answer."""
    room = config.evaluation.max_new_tokens
    wanted = pairs.source[: config.evaluation.answers].tolist()
    messages = [records["messages"][i] for i in wanted]
    longest = max(1, config.training.max_length - room)
    tokens = encode_prompts(messages, model.tokenizer, config.data.template, longest)
    texts = [turns[-1]["content"] for turns in messages]
    return Prompts(texts, tokens, [records["chosen"][i] for i in wanted], Decoding(room))


def side_by_side(
    model: AdaptedModel, params: Params, prompts: Prompts, label: str = "with the adapter"
) -> str:
    """Markdown with the prompts and their answers: the base model's, the adapter's, the data's.

    Args:
        label: what the adapter `params` is called there.
    """
    if not prompts.tokens:
        return ""
    model.load(params)
    with model.peft.disable_adapter():
        base = generate(model, prompts.tokens, prompts.decoding)
    adapted = generate(model, prompts.tokens, prompts.decoding)
    sections = ["# Answers to held-out prompts"]
    for prompt, before, after, chosen in zip(
        prompts.texts, base, adapted, prompts.chosen, strict=True
    ):
        answers = {
            "base model": as_text(model, before),
            label: as_text(model, after),
            "the better answer in the data": chosen,
        }
        parts = [f"**{name}**\n\n{_quoted(text)}" for name, text in answers.items()]
        sections.append("\n\n".join([f"## Prompt\n\n{_quoted(prompt)}", *parts]))
    return "\n\n".join(sections) + "\n"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])
