"""Greedy answers to prompts, several at a time."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from fedllm_flwr.data.tokens import TokenArray
from fedllm_flwr.models.adapted_model import AdaptedModel


@torch.inference_mode()
def greedy_answers(
    model: AdaptedModel,
    prompts: Sequence[TokenArray],
    max_new_tokens: int,
    processors: Sequence[LogitsProcessor] = (),
) -> list[TokenArray]:
    """The most likely continuation of each prompt, token by token, up to and with its EOS.

    Args:
        processors: what changes the scores of the next token first; `SeededSampling` draws it.
    """
    model.peft.eval()
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.full((len(prompts), longest), model.pad_id, np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):  # on the left, so that all answers start together
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    with decoding_as_asked(model):
        output: Any = model.peft.generate(
            input_ids=torch.from_numpy(tokens).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList(processors),
            use_cache=True,
            pad_token_id=model.pad_id,
            eos_token_id=model.tokenizer.eos_token_id,
        )
    answers = output[:, longest:].cpu().numpy().astype(np.int32)
    return [_until(answer, model.tokenizer.eos_token_id) for answer in answers]


@contextlib.contextmanager
def decoding_as_asked(model: AdaptedModel) -> Iterator[None]:
    """Within it, ``generate`` does what its arguments say and nothing else.

    transformers takes whatever they leave open, such as a repetition penalty or forced tokens, from
    the ``generation_config`` that the base model's authors published.
    """
    base: Any = model.peft.get_base_model()
    published = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = published


def as_text(model: AdaptedModel, answer: TokenArray) -> str:
    """An answer without special tokens."""
    text: str = model.tokenizer.decode(answer, skip_special_tokens=True)
    return text.strip()


def _until(answer: TokenArray, eos: int) -> TokenArray:
    ends = np.flatnonzero(answer == eos)
    return answer[: ends[0] + 1] if len(ends) else answer
