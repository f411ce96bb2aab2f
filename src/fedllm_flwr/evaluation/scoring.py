"""Forward passes for scores: tokens and labels by likelihood, batched to a token budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedllm_flwr.data.choices import EncodedChoices
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.training.batches import IGNORED, collate_padded, needed_logits
from fedllm_flwr.training.log_probs import by_length, forward


@dataclass(frozen=True)
class TokenScores:
    """Sums over supervised tokens: their number, negative log-likelihood and correct guesses."""

    num_tokens: int
    nll: float
    num_correct: int


@torch.inference_mode()
def score_tokens(model: AdaptedModel, examples: Encoded, batch_tokens: int) -> TokenScores:
    """Negative log-likelihood (nats) and greedy accuracy of all supervised tokens."""
    model.peft.eval()
    num_tokens, nll, num_correct = 0, 0.0, 0
    for batch in by_length(examples.lengths, batch_tokens):
        inputs = collate_padded(examples, batch, model.pad_id)
        if model.selects_logits:
            inputs = needed_logits(inputs)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        labels = inputs.pop("labels")
        shifted = inputs.pop("shift_labels", None)
        logits = forward(model, use_cache=False, **inputs).logits
        wanted = labels[:, 1:] if shifted is None else shifted
        chosen = wanted != IGNORED
        logits = logits[:, : wanted.shape[1]][chosen].float()  # (supervised, vocab)
        targets = wanted[chosen]
        nll += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        num_correct += int((logits.argmax(-1) == targets).sum())
        num_tokens += len(targets)
    return TokenScores(num_tokens, nll, num_correct)


@torch.inference_mode()
def score_choices(
    model: AdaptedModel, choices: EncodedChoices, batch_tokens: int
) -> NDArray[np.float64]:
    """Log-likelihood (nats) of every label as the answer, shape (records, labels).

    Prompts of one length go together, so that nothing is padded before the answers; each prompt
    is computed once for all its labels.
    """
    model.peft.eval()
    num_labels = len(choices.answers[0]) if len(choices) else 0
    scores = np.zeros((len(choices), num_labels))
    lengths = np.array([len(prompt) for prompt in choices.prompts], np.int64)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        size = max(1, batch_tokens // int(length))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            scores[part] = _score_group(model, choices, part)
    return scores


def _score_group(
    model: AdaptedModel, choices: EncodedChoices, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Scores of prompts of one length: (rows, labels)."""
    device = model.device
    prompts = np.stack([choices.prompts[row] for row in rows]).astype(np.int64)
    answers = [answer for row in rows for answer in choices.answers[row]]
    num_labels = len(choices.answers[0])
    tokens, mask = _right_padded(answers, device)  # (rows * labels, longest answer)
    input_ids = torch.from_numpy(prompts).to(device)
    more = tokens.shape[1] > 1
    last = {"logits_to_keep": 1} if model.selects_logits else {}
    prefix = forward(model, input_ids=input_ids, use_cache=more, **last)
    logits = prefix.logits[:, -1:].repeat_interleave(num_labels, 0)
    if more:
        name = model.cache_name
        cache = prefix[name]
        cache.batch_repeat_interleave(num_labels)
        rest = forward(model, input_ids=tokens[:, :-1], use_cache=True, **{name: cache})
        logits = torch.cat([logits, rest.logits], dim=1)  # (rows * labels, longest, vocab)
    log_probs = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    totals = (log_probs.double() * mask).sum(-1).reshape(len(rows), num_labels)
    return np.asarray(totals.cpu().numpy(), np.float64)


def _right_padded(
    answers: Sequence[NDArray[np.int32]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, zero after the end, and 1 where there is a token; both (answers, longest)."""
    shape = (len(answers), max(len(answer) for answer in answers))
    tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, np.float64)
    for row, answer in enumerate(answers):
        tokens[row, : len(answer)] = answer
        mask[row, : len(answer)] = 1
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)
