"""Log-likelihoods of continuations: each prompt computed once for all that may follow it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedllm_flwr.data.tokens import TokenArray
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.training.log_probs import by_length, forward


@dataclass(frozen=True)
class Question:
    """A prompt and its possible continuations, as tokens."""

    prompt: TokenArray  # (prompt length,)
    answers: list[TokenArray]  # each (answer length,), at least one token


@dataclass(frozen=True)
class Score:
    """Log-likelihood (nats) of a continuation, and whether greedy decoding would write it."""

    log_prob: float
    is_greedy: bool


@torch.inference_mode()
def score_questions(
    model: AdaptedModel, questions: Sequence[Question], batch_tokens: int
) -> list[list[Score]]:
    """Scores of every answer of every question, [question][answer].

    Questions of like lengths go together, padded on the left, so that all their answers start at
    one place. Answers of one token need no pass of their own: they are read off the prompt's last
    position.
    """
    model.peft.eval()
    scores: list[list[Score]] = [[] for _ in questions]
    for counted in _alike(questions):
        lengths = np.array([len(questions[i].prompt) for i in counted], np.int64)
        for batch in by_length(lengths, batch_tokens):
            rows = [counted[i] for i in batch]
            found = _score_batch(model, [questions[i] for i in rows])
            for row, answers in zip(rows, found, strict=True):
                scores[row] = answers
    return scores


def _alike(questions: Sequence[Question]) -> list[list[int]]:
    """Indices of the questions by number of answers, and by whether one has several tokens."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, question in enumerate(questions):
        longer = any(len(answer) > 1 for answer in question.answers)
        groups.setdefault((len(question.answers), longer), []).append(i)
    return list(groups.values())


def _score_batch(model: AdaptedModel, questions: Sequence[Question]) -> list[list[Score]]:
    prompts, mask = left_padded([question.prompt for question in questions], model)
    each = len(questions[0].answers)
    answers = [answer for question in questions for answer in question.answers]
    longest = max(len(answer) for answer in answers)
    last = {"logits_to_keep": 1} if model.selects_logits else {}
    inputs = {"input_ids": prompts, "attention_mask": mask, **_positions(model, mask), **last}
    prefix = forward(model, use_cache=longest > 1, **inputs)
    first = prefix.logits[:, -1].float().log_softmax(-1)  # (rows, vocab)
    tokens = np.zeros((len(answers), longest), np.int64)
    real = np.zeros((len(answers), longest), np.bool_)
    for row, answer in enumerate(answers):
        tokens[row, : len(answer)] = answer
        real[row, : len(answer)] = True
    wanted = torch.from_numpy(tokens).to(model.device)
    starts = wanted[:, 0].reshape(len(questions), each)
    log_probs = first.gather(-1, starts).reshape(-1, 1)
    greedy = (first.argmax(-1, keepdim=True) == starts).reshape(-1, 1)
    if longest > 1:
        rest = _continued(model, prefix, mask, wanted, each)
        more = _of_tokens(rest.float().log_softmax(-1), wanted[:, 1:])
        log_probs, greedy = torch.cat([log_probs, more[0]], 1), torch.cat([greedy, more[1]], 1)
    sums = (log_probs.double().cpu().numpy() * real).sum(1)
    exact = (greedy.cpu().numpy() | ~real).all(1)
    flat = [Score(float(value), bool(hit)) for value, hit in zip(sums, exact, strict=True)]
    return [flat[i : i + each] for i in range(0, len(flat), each)]


def _continued(
    model: AdaptedModel, prefix: Any, mask: torch.Tensor, wanted: torch.Tensor, each: int
) -> torch.Tensor:
    """Logits after all but the last of the answers' tokens, (rows * each, longest - 1, vocab)."""
    cache = prefix[model.cache_name]
    cache.batch_repeat_interleave(each)
    fed = wanted[:, :-1]
    whole = torch.cat([mask.repeat_interleave(each, 0), torch.ones_like(fed)], 1)
    places = {
        name: positions[:, mask.shape[1] :] for name, positions in _positions(model, whole).items()
    }
    inputs = {"input_ids": fed, "attention_mask": whole, model.cache_name: cache, **places}
    logits: torch.Tensor = forward(model, use_cache=True, **inputs).logits
    return logits


def _of_tokens(log_probs: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of each token, and whether it is the most likely one: both (rows, positions)."""
    chosen = log_probs.gather(-1, tokens[..., None])[..., 0]
    return chosen, log_probs.argmax(-1) == tokens


def _positions(model: AdaptedModel, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """``position_ids`` that start at the first real token, if the model takes them."""
    if not model.takes_positions:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def left_padded(
    prompts: Sequence[TokenArray], model: AdaptedModel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask on the model's device, both (prompts, longest)."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.full((len(prompts), longest), model.pad_id, np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(tokens).to(model.device), torch.from_numpy(mask).to(model.device)
