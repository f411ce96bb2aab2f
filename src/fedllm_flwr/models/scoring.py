"""Log-probabilities of text: of continuations of a prompt, and of encoded conversations.

The one place where text is scored: the reference of preference training, evaluation on held-out
records at server and clients, and benchmark suites.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.data.tokens import TokenArray
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.inputs import (
    IGNORED,
    by_length,
    collate_padded,
    forward,
    left_padded,
    needed_logits,
    positions,
)


@dataclass(frozen=True)
class Question:
    """A prompt and its possible continuations, as tokens."""

    prompt: TokenArray  # (prompt length,)
    answers: Sequence[TokenArray]  # each (answer length,), at least one token


@dataclass(frozen=True)
class Score:
    """Log-likelihood (nats) of a continuation, and whether greedy decoding would write it."""

    log_prob: float
    is_greedy: bool


@torch.inference_mode()
def score(
    model: AdaptedModel, questions: Sequence[Question], batch_tokens: int
) -> list[list[Score]]:
    """Scores of every continuation of every prompt, [question][answer].

    A prompt is computed once for all its continuations, and those of one token are read off its
    last position. Questions of like lengths go together, padded on the left; those of equal lengths
    if the model cannot be told where its tokens stand.
    """
    model.peft.eval()
    scores: list[list[Score]] = [[] for _ in questions]
    groups: dict[tuple[int, bool, int], list[int]] = {}
    for i, question in enumerate(questions):
        longer = any(len(answer) > 1 for answer in question.answers)
        length = 0 if model.takes_positions else len(question.prompt)
        groups.setdefault((len(question.answers), longer, length), []).append(i)
    for group in groups.values():
        lengths = np.array([len(questions[i].prompt) for i in group], np.int64)
        for batch in by_length(lengths, batch_tokens):
            rows = [group[i] for i in batch]
            for row, found in zip(
                rows, _score_batch(model, [questions[i] for i in rows]), strict=True
            ):
                scores[row] = found
    return scores


def _score_batch(model: AdaptedModel, questions: Sequence[Question]) -> list[list[Score]]:
    """Scores of questions with equally many answers."""
    each = len(questions[0].answers)
    answers = [answer for question in questions for answer in question.answers]
    longest = max(len(answer) for answer in answers)
    tokens = np.zeros((len(answers), longest), np.int64)
    real = np.zeros((len(answers), longest), np.bool_)
    for row, answer in enumerate(answers):
        tokens[row, : len(answer)] = answer
        real[row, : len(answer)] = True
    wanted = torch.from_numpy(tokens).to(model.device)
    prompts, mask = left_padded([question.prompt for question in questions], model)
    last = {"logits_to_keep": 1} if model.selects_logits else {}
    inputs = {"input_ids": prompts, "attention_mask": mask, **positions(model, mask), **last}
    prefix = forward(model, use_cache=longest > 1, **inputs)
    first = prefix.logits[:, -1].float().log_softmax(-1)  # (questions, vocab)
    starts = wanted[:, 0].reshape(len(questions), each)
    log_probs = first.gather(-1, starts).reshape(-1, 1)
    greedy = (first.argmax(-1, keepdim=True) == starts).reshape(-1, 1)
    if longest > 1:
        cache = prefix[model.cache_name]
        cache.batch_repeat_interleave(each)
        fed = wanted[:, :-1]
        whole = torch.cat([mask.repeat_interleave(each, 0), torch.ones_like(fed)], 1)
        places = {name: rows[:, mask.shape[1] :] for name, rows in positions(model, whole).items()}
        inputs = {"input_ids": fed, "attention_mask": whole, model.cache_name: cache, **places}
        rest = forward(model, use_cache=True, **inputs).logits.float().log_softmax(-1)
        later = rest.gather(-1, wanted[:, 1:, None])[..., 0]  # (answers, longest - 1)
        log_probs = torch.cat([log_probs, later], 1)
        greedy = torch.cat([greedy, rest.argmax(-1) == wanted[:, 1:]], 1)
    sums = (log_probs.double().cpu().numpy() * real).sum(1)
    exact = (greedy.cpu().numpy() | ~real).all(1)
    flat = [Score(float(value), bool(hit)) for value, hit in zip(sums, exact, strict=True)]
    return [flat[i : i + each] for i in range(0, len(flat), each)]


@dataclass(frozen=True)
class ExampleScores:
    """Sums over each example's supervised tokens, all (examples,)."""

    log_probs: NDArray[np.float32]  # nats
    num_tokens: NDArray[np.int64]
    num_correct: NDArray[np.int64]  # tokens that greedy decoding would write

    @property
    def loss(self) -> float:
        """Negative log-likelihood (nats) of a supervised token, the mean over all of them."""
        return -float(self.log_probs.sum(dtype=np.float64)) / max(1, int(self.num_tokens.sum()))

    @property
    def token_accuracy(self) -> float:
        """Share of all supervised tokens that are the most likely ones."""
        return int(self.num_correct.sum()) / max(1, int(self.num_tokens.sum()))


@torch.inference_mode()
def score_examples(model: AdaptedModel, examples: Encoded, batch_tokens: int) -> ExampleScores:
    """Log-probabilities and greedy hits of each example's supervised tokens."""
    model.peft.eval()
    log_probs = np.zeros(len(examples), np.float32)
    num_tokens = np.zeros(len(examples), np.int64)
    num_correct = np.zeros(len(examples), np.int64)
    for batch in by_length(examples.lengths, batch_tokens):
        inputs = collate_padded(examples, batch, model.pad_id)
        if model.selects_logits:
            inputs = needed_logits(inputs)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        labels = inputs.pop("labels")
        wanted = inputs.pop("shift_labels", labels[:, 1:])
        logits = forward(model, use_cache=False, **inputs).logits[:, : wanted.shape[1]]
        log_probs[batch] = token_log_probs(logits, wanted).sum(1).cpu().numpy()
        num_tokens[batch] = (wanted != IGNORED).sum(1).cpu().numpy()
        num_correct[batch] = (logits.argmax(-1) == wanted).sum(1).cpu().numpy()
    return ExampleScores(log_probs, num_tokens, num_correct)


def trained_log_probs(
    model: AdaptedModel, examples: Encoded, rows: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of the supervised tokens of chosen rows, with gradients, and each row's number of them.

    Returns:
        (rows, positions), zero where there is nothing to learn; and (rows,).
    """
    inputs = collate_padded(examples, list(rows), model.pad_id)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    labels = inputs.pop("labels")
    wanted = labels[:, 1:]
    if model.selects_logits:
        needed = needed_logits({"labels": labels})
        wanted, inputs["logits_to_keep"] = needed["shift_labels"], needed["logits_to_keep"]
    logits = model.peft(**inputs, use_cache=False).logits[:, : wanted.shape[1]]
    return token_log_probs(logits, wanted), (wanted != IGNORED).sum(1)


def token_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) at each position, (rows, positions); zero where the target is `IGNORED`."""
    flat = cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -flat.view_as(targets)
