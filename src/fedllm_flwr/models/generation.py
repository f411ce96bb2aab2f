"""Answers to prompts, greedy or sampled: the same answer in whichever batch it is written.

The one place where text is written: answers to held-out prompts, ``fedllm generate``, benchmark
suites, open-ended questions and code.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from fedllm_flwr.data.tokens import TokenArray
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.inputs import by_length, in_dtype, left_padded
from fedllm_flwr.params import derive_seed

_LOOK_BACK = 8  # tokens that may hold the start of a stop text, besides its own characters


@dataclass(frozen=True)
class Decoding:
    """How answers are written: greedily at temperature 0, sampled above.

    Args:
        top_p: share of the probability that tokens are drawn from (nucleus sampling).
        stop: texts with which an answer ends.
        seed: of sampled answers; each row of a call has a sequence of its own.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


@torch.inference_mode()
def generate(
    model: AdaptedModel,
    prompts: Sequence[TokenArray],
    decoding: Decoding,
    batch_tokens: int | None = None,
    temperatures: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[TokenArray]:
    """The answer to each prompt, up to and with its EOS.

    A row's answer does not depend on the others. The base model's ``generation_config`` (a
    repetition penalty, forced tokens) is not obeyed.

    Args:
        batch_tokens: of one batch, prompts and room for answers; None: all together.
        temperatures, seeds: per prompt, in the place of `decoding`'s.
    """
    model.peft.eval()
    if temperatures is None:
        temperatures = [decoding.temperature] * len(prompts)
    if seeds is None:
        seeds = [derive_seed(decoding.seed, "answer", row) for row in range(len(prompts))]
    lengths = np.array([len(prompt) + decoding.max_new_tokens for prompt in prompts], np.int64)
    if batch_tokens is None:
        batch_tokens = len(prompts) * int(lengths.max(initial=0))
    answers: list[TokenArray] = [np.empty(0, np.int32)] * len(prompts)
    for batch in by_length(lengths, batch_tokens):
        sampling = SeededSampling(
            [temperatures[i] for i in batch], [seeds[i] for i in batch], decoding.top_p
        )
        written = _write_batch(model, [prompts[i] for i in batch], decoding, sampling)
        for row, answer in zip(batch, written, strict=True):
            answers[row] = answer
    return answers


def as_text(
    model: AdaptedModel, answer: TokenArray, stop: Sequence[str] = (), strip: bool = True
) -> str:
    """An answer without special tokens, up to the first stop text after its leading white space.

    Code keeps its indentation with `strip` False.
    """
    text: str = model.tokenizer.decode(answer, skip_special_tokens=True)
    start = len(text) - len(text.lstrip())
    found = [place for mark in stop if (place := text.find(mark, start)) >= 0]
    text = text[: min(found)] if found else text
    return text.strip() if strip else text


def _write_batch(
    model: AdaptedModel,
    prompts: Sequence[TokenArray],
    decoding: Decoding,
    sampling: "SeededSampling",
) -> list[TokenArray]:
    tokens, mask = left_padded(prompts, model)
    ways: dict[str, Any] = {}
    if decoding.stop:
        stopping = _StopTexts(model.tokenizer, decoding.stop, tokens.shape[1])
        ways["stopping_criteria"] = StoppingCriteriaList([stopping])
    if sampling.draws:
        ways["logits_processor"] = LogitsProcessorList([sampling])
    with _decoding_as_asked(model), in_dtype(model):
        output: Any = model.peft.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=model.pad_id,
            eos_token_id=model.tokenizer.eos_token_id,
            **ways,
        )
    answers = output[:, tokens.shape[1] :].cpu().numpy().astype(np.int32)
    eos = model.tokenizer.eos_token_id
    return [answer[: 1 + int(np.argmax(np.append(answer, eos) == eos))] for answer in answers]


@contextlib.contextmanager
def _decoding_as_asked(model: AdaptedModel) -> Iterator[None]:
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


class SeededSampling(LogitsProcessor):
    """Lets through one token per row, drawn from softmax(scores / temperature).

    Each draw turns one uniform number of the row's own sequence into a token by the inverse of the
    cumulative distribution, so that a row's answer does not depend on its neighbours, and an answer
    made again is the same. Rows of temperature 0 keep their scores: the most likely token.

    Args:
        temperatures: per row, >= 0.
        seeds: per row.
        top_p: share of the probability that is drawn from, the most likely tokens first.
    """

    def __init__(
        self, temperatures: Sequence[float], seeds: Sequence[int], top_p: float = 1.0
    ) -> None:
        self._temperatures = np.array(temperatures, np.float64)
        self._sequences = [np.random.default_rng(seed) for seed in seeds]
        self._nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    @property
    def draws(self) -> bool:
        """Whether any row is sampled."""
        return bool((self._temperatures > 0).any())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores, (rows, vocabulary), with -inf at all tokens of a row but the drawn one."""
        uniform = np.array([sequence.random() for sequence in self._sequences])
        rows = np.flatnonzero(self._temperatures > 0)
        sampled = torch.from_numpy(rows).to(scores.device)
        heat = torch.from_numpy(self._temperatures[rows]).to(scores.device, torch.float32)
        heated = scores[sampled].float() / heat[:, None]
        if self._nucleus is not None:
            heated = self._nucleus(input_ids[sampled], heated)
        reached = heated.softmax(-1).double().cumsum(-1)
        wanted = torch.from_numpy(uniform[rows]).to(scores.device) * reached[:, -1]
        tokens = torch.searchsorted(reached, wanted[:, None], right=True)
        tokens = tokens.clamp(max=scores.shape[-1] - 1)
        kept = torch.full_like(scores[sampled], -torch.inf).scatter_(-1, tokens, 0.0)
        result = scores.clone()
        result[sampled] = kept
        return result


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
