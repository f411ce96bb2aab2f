"""Encodes conversations as training examples: tokens, supervision masks and truncation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.data.records import Messages
from fedllm_flwr.data.templates import Segment, Tokenizer, render, render_prompt
from fedllm_flwr.data.tokens import Mask, TokenArray, require_eos, tokenise
from fedllm_flwr.errors import ConfigError

KEEP: Literal["keep"] = "keep"  # keeps every record, however long; sites always use it
_COUNTED = 2**22  # tokens counted at a time
TRUNCATIONS = ("right", "left", "drop", KEEP)


@dataclass(frozen=True)
class EncodeReport:
    """Counts of encoded, truncated and dropped records: num_records = num_examples + dropped."""

    num_records: int
    num_examples: int
    truncated: int  # kept, but truncated to max_length
    dropped: int  # too long under truncation=drop, or nothing supervised left after the cut
    num_tokens: int
    num_supervised: int

    @property
    def summary(self) -> str:
        """The truncation report as text; "" if nothing was truncated or dropped."""
        if not (self.truncated or self.dropped):
            return ""
        return f"{self.truncated} of {self.num_records} records cut, {self.dropped} left out"


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples in flat arrays; example i is the slice offsets[i]:offsets[i + 1]."""

    tokens: TokenArray  # (num_tokens,)
    supervised: Mask  # (num_tokens,): True where the token enters the loss
    offsets: NDArray[np.int64]  # (num_examples + 1,)
    source: NDArray[np.int64]  # (num_examples,): index of the record of each example
    report: EncodeReport

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[TokenArray, Mask]:
        """(tokens, supervised) of one example, as views."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.supervised[span]

    def take(self, examples: NDArray[np.int64]) -> "Encoded":
        """The selected examples in the given order, with their own report."""
        kept = [self[int(i)] for i in examples]
        return flatten(kept, self.source[examples].tolist(), len(kept), truncated=0)

    @cached_property
    def token_counts(self) -> NDArray[np.int64]:
        """Number of occurrences of each token id, shape (largest id + 1,)."""
        counts = np.zeros(int(self.tokens.max(initial=0)) + 1, np.int64)
        for start in range(0, len(self.tokens), _COUNTED):
            counts += np.bincount(self.tokens[start : start + _COUNTED], minlength=len(counts))
        return counts

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example, shape (num_examples,)."""
        return np.diff(self.offsets)

    def num_tokens_of(self, examples: NDArray[np.int64]) -> int:
        """Total number of tokens of the selected examples."""
        return int(self.lengths[examples].sum())


def encode(
    conversations: Sequence[Messages],
    tokenizer: Tokenizer,
    template: str,
    max_length: int,
    truncation: str = "right",
) -> Encoded:
    """Render and tokenise conversations for training, at most ``max_length`` tokens each.

    The tokens before the first answer equal those of ``encode_prompts`` for the same prompt.
    Raises ConfigError for unknown options and ModelError for an unusable tokenizer.
    """
    require_truncation(truncation)
    rendered = [render(messages, template, tokenizer) for messages in conversations]
    require_eos(tokenizer)
    kept: list[tuple[TokenArray, Mask]] = []
    source: list[int] = []
    truncated = 0
    for i, (tokens, supervised) in enumerate(tokenise(rendered, tokenizer, max_length)):
        length = len(tokens)
        if length > max_length:
            if truncation == "drop":
                continue
            if truncation == "left" or (truncation == KEEP and not supervised[:max_length].any()):
                bos = tokenizer.bos_token_id
                tokens, supervised = _cut_left(tokens, supervised, max_length, bos)
            tokens, supervised = tokens[:max_length], supervised[:max_length]
        if supervised.any():
            truncated += len(tokens) < length
            kept.append((tokens, supervised))
            source.append(i)
    return flatten(kept, source, len(rendered), truncated)


def require_truncation(truncation: str) -> None:
    """Raise ConfigError for an unknown truncation strategy."""
    if truncation not in TRUNCATIONS:
        raise ConfigError(f"data.truncation={truncation}; use one of: {', '.join(TRUNCATIONS)}")


def encode_prompts(
    prompts: Sequence[Messages], tokenizer: Tokenizer, template: str, max_length: int | None = None
) -> list[TokenArray]:
    """Prompt tokens for generation, one array of shape (length,) per conversation.

    ``prompts`` end with a user turn. Long prompts are truncated at their start, after the BOS.
    """
    rendered = [[Segment(render_prompt(turns, template, tokenizer), False)] for turns in prompts]
    tokens = [tokens for tokens, _ in tokenise(rendered, tokenizer)]
    if max_length is None:
        return tokens
    return [cut_start(prompt, max_length, tokenizer.bos_token_id) for prompt in tokens]


def cut_start(tokens: TokenArray, max_length: int, bos: int | None) -> TokenArray:
    """The last ``max_length`` tokens; an initial BOS is kept as the first of them."""
    if len(tokens) <= max_length:
        return tokens
    kept_bos = tokens[:1] if len(tokens) and tokens[0] == bos else tokens[:0]
    return np.concatenate([kept_bos, tokens[len(tokens) - max_length + len(kept_bos) :]])


def _cut_left(
    tokens: TokenArray, supervised: Mask, max_length: int, bos: int | None
) -> tuple[TokenArray, Mask]:
    """Remove excess tokens after the BOS, but none of the last answer."""
    num_bos = int(tokens[0] == bos)
    context = np.flatnonzero(~supervised)
    last_answer = int(context[-1]) + 1 if len(context) else 0
    start = max(num_bos, min(num_bos + len(tokens) - max_length, last_answer))
    supervised = supervised.copy()
    if start < last_answer and supervised[start - 1]:  # an earlier answer cut in two is context
        end = start + int(np.argmin(supervised[start:]))
        supervised[start:end] = False
    return (
        np.concatenate([tokens[:num_bos], tokens[start:]]),
        np.concatenate([supervised[:num_bos], supervised[start:]]),
    )


def flatten(
    kept: list[tuple[TokenArray, Mask]], source: list[int], num_records: int, truncated: int
) -> Encoded:
    """The kept examples of ``num_records`` records, and the record of each example."""
    tokens = np.concatenate([np.empty(0, np.int32), *(example[0] for example in kept)])
    supervised = np.concatenate([np.empty(0, np.bool_), *(example[1] for example in kept)])
    offsets = np.zeros(len(kept) + 1, np.int64)
    np.cumsum([len(example[0]) for example in kept], out=offsets[1:])
    report = EncodeReport(
        num_records=num_records,
        num_examples=len(kept),
        truncated=truncated,
        dropped=num_records - len(kept),
        num_tokens=len(tokens),
        num_supervised=int(supervised.sum()),
    )
    return Encoded(tokens, supervised, offsets, np.array(source, np.int64), report)
