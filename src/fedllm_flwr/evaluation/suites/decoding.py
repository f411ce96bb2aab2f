"""Answers to many prompts: greedy or sampled, in batches, up to an end token or a stop text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from fedllm_flwr.data.tokens import TokenArray
from fedllm_flwr.evaluation.answers import decoding_as_asked
from fedllm_flwr.evaluation.suites.likelihood import left_padded
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.training.log_probs import by_length

_LOOK_BACK = 8  # tokens that may hold the start of a stop text, besides its own characters


@dataclass(frozen=True)
class Decoding:
    """How answers are written: greedily at temperature 0, sampled above."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@torch.inference_mode()
def write_answers(
    model: AdaptedModel,
    prompts: Sequence[TokenArray],
    decoding: Decoding,
    batch_tokens: int,
    seed: int,
) -> list[str]:
    """One answer for each prompt, without special tokens, cut before the first stop text.

    Longest prompts first, in batches of at most `batch_tokens` with the room for their answers.
    Sampling is seeded per batch, so it repeats for the same prompts.
    """
    model.peft.eval()
    room = np.array([len(prompt) + decoding.max_new_tokens for prompt in prompts], np.int64)
    answers = [""] * len(prompts)
    for batch in by_length(room, batch_tokens):
        written = _write_batch(model, [prompts[i] for i in batch], decoding, seed + batch[0])
        for i, text in zip(batch, written, strict=True):
            answers[i] = text
    return answers


def _write_batch(
    model: AdaptedModel, prompts: Sequence[TokenArray], decoding: Decoding, seed: int
) -> list[str]:
    tokens, mask = left_padded(prompts, model)
    sampled = decoding.temperature > 0
    ways: dict[str, Any] = {"do_sample": sampled}
    if sampled:
        ways |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    if decoding.stop:
        stopping = _StopTexts(model.tokenizer, decoding.stop, tokens.shape[1])
        ways["stopping_criteria"] = StoppingCriteriaList([stopping])
    devices = [model.device] if model.device.type == "cuda" else []
    generate: Any = model.peft.generate
    narrow = model.dtype != torch.float32
    with (
        decoding_as_asked(model),
        torch.random.fork_rng(devices=devices),
        torch.autocast(model.device.type, dtype=model.dtype, enabled=narrow),
    ):
        torch.manual_seed(seed)
        output = generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=decoding.max_new_tokens,
            use_cache=True,
            pad_token_id=model.pad_id,
            eos_token_id=model.tokenizer.eos_token_id,
            **ways,
        )
    texts = model.tokenizer.batch_decode(output[:, tokens.shape[1] :], skip_special_tokens=True)
    return [_cut(text, decoding.stop) for text in texts]


def _cut(text: str, stop: Sequence[str]) -> str:
    """`text` before the first stop text that occurs after its leading white space."""
    start = len(text) - len(text.lstrip())
    found = [place for mark in stop if (place := text.find(mark, start)) >= 0]
    return text[: min(found)] if found else text


class _StopTexts(StoppingCriteria):
    """Ends a row when its answer holds one of some texts."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_length: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, stop, prompt_length
        self._tail = max(len(mark.encode()) for mark in stop) + _LOOK_BACK

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        new = input_ids[:, max(self._start, input_ids.shape[1] - self._tail) :]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        done = [any(mark in text.lstrip() for mark in self._stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)
