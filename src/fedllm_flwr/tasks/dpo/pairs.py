"""Preference pairs as training examples: two token sequences ("rows") with the same prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.data.encode import KEEP, Encoded, flatten, require_truncation
from fedllm_flwr.data.kinds import RecordKind
from fedllm_flwr.data.templates import Tokenizer, render_answers
from fedllm_flwr.data.token_cache import Codec
from fedllm_flwr.data.tokens import TokenArray, require_eos, tokenise
from fedllm_flwr.tasks.preferences.encoding import TokenRow, cut_prompt, joined, split
from fedllm_flwr.tasks.preferences.records import Pair, make_pairs


@dataclass(frozen=True)
class PairReport:
    """Truncation report: num_records = num_pairs + dropped."""

    num_records: int
    num_pairs: int
    prompts_cut: int  # pairs whose prompt lost its start
    prompt_tokens_cut: int  # total tokens cut from these prompts, as far as they were tokenised
    answers_cut: int  # answers that lost their end, at most two per pair
    dropped: int  # too long under truncation=drop, or both answers equal after truncation

    @property
    def summary(self) -> str:
        """The truncation report as text; "" if every pair fits."""
        if not (self.prompts_cut or self.answers_cut or self.dropped):
            return ""
        return (
            f"{self.prompts_cut} of {self.num_records} pairs lost the start of their prompt "
            f"({self.prompt_tokens_cut} tokens in all), {self.answers_cut} answers cut, "
            f"{self.dropped} left out"
        )


@dataclass(frozen=True)
class EncodedPairs:
    """Tokenised pairs; rows 2i and 2i + 1 are pair i's prompt with the chosen, rejected answer.

    ``supervised`` marks only the tokens of the last answer, with its EOS.
    """

    rows: Encoded
    report: PairReport

    def __len__(self) -> int:
        return len(self.rows) // 2

    def __getitem__(self, index: int) -> tuple[TokenRow, TokenRow]:
        """(tokens, supervised) of the chosen and the rejected row, as views."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index %= len(self)
        return self.rows[2 * index], self.rows[2 * index + 1]

    def take(self, pairs: NDArray[np.int64]) -> "EncodedPairs":
        """The selected pairs, in the given order, with a report of only these pairs."""
        report = PairReport(len(pairs), len(pairs), 0, 0, 0, 0)
        return EncodedPairs(self.rows.take(_rows_of(pairs)), report)

    @property
    def tokens(self) -> TokenArray:
        """The tokens of all rows, flat."""
        return self.rows.tokens

    @property
    def token_counts(self) -> NDArray[np.int64]:
        """Number of occurrences of each token id in all rows."""
        return self.rows.token_counts

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each pair's longer row, shape (num_pairs,)."""
        return np.maximum(self.rows.lengths[::2], self.rows.lengths[1::2])

    @property
    def source(self) -> NDArray[np.int64]:
        """Index of the record of each pair, shape (num_pairs,)."""
        return self.rows.source[::2]

    def num_tokens_of(self, pairs: NDArray[np.int64]) -> int:
        """Total number of tokens in both rows of the selected pairs."""
        return self.rows.num_tokens_of(_rows_of(pairs))


class _Tokens(NamedTuple):
    """The three parts of a pair, each of shape (length,)."""

    prompt: TokenArray
    chosen: TokenArray
    rejected: TokenArray


def encode_pairs(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    template: str,
    max_length: int,
    truncation: str = "right",
) -> EncodedPairs:
    """Render and tokenise pairs for training, at most ``max_length`` tokens per row.

    The prompt's tokens equal those of ``encode_prompts``. If a pair is too long, the start of the
    prompt is cut, down to half of ``max_length``; then the end of an answer is cut if it still does
    not fit. truncation=drop leaves out pairs that are too long; keep leaves out no pair, not even
    one whose answers are equal after truncation.
    Raises ConfigError for unknown options and ModelError for an unusable tokenizer.
    """
    require_truncation(truncation)
    rendered = [
        row
        for pair in pairs
        for row in render_answers(pair.messages, [pair.chosen, pair.rejected], template, tokenizer)
    ]
    require_eos(tokenizer)
    losses = _Losses()
    kept: list[TokenRow] = []
    source: list[int] = []
    for i, whole in enumerate(_by_pair(tokenise(rendered, tokenizer, max_length))):
        fitted = _fit(whole, max_length, tokenizer.bos_token_id)
        lost = [len(before) - len(after) for before, after in zip(whole, fitted, strict=True)]
        is_equal = truncation != KEEP and np.array_equal(fitted.chosen, fitted.rejected)
        if is_equal or (any(lost) and truncation == "drop"):
            continue
        losses.add(*lost)
        kept += [joined(fitted.prompt, fitted.chosen), joined(fitted.prompt, fitted.rejected)]
        source += [i, i]
    report = losses.report(len(pairs), len(kept) // 2)
    return EncodedPairs(flatten(kept, source, 2 * len(pairs), losses.rows), report)


@dataclass
class _Losses:
    """Counts of tokens that the kept pairs have lost to truncation."""

    prompts: int = 0
    prompt_tokens: int = 0
    answers: int = 0
    rows: int = 0

    def add(self, prompt: int, chosen: int, rejected: int) -> None:
        """Count the tokens that one pair has lost."""
        self.prompts += prompt > 0
        self.prompt_tokens += prompt
        self.answers += (chosen > 0) + (rejected > 0)
        self.rows += (prompt + chosen > 0) + (prompt + rejected > 0)

    def report(self, num_records: int, num_pairs: int) -> PairReport:
        dropped = num_records - num_pairs
        return PairReport(
            num_records, num_pairs, self.prompts, self.prompt_tokens, self.answers, dropped
        )


def _by_pair(rows: Iterator[TokenRow]) -> Iterator[_Tokens]:
    """The parts of each pair of rows; the prompt's tokens do not depend on the answer."""
    for (tokens, supervised), (other, other_supervised) in zip(rows, rows, strict=True):
        yield _Tokens(*split(tokens, supervised), split(other, other_supervised)[1])


def _fit(whole: _Tokens, max_length: int, bos: int | None) -> _Tokens:
    """The end of the prompt and the starts of the answers, to fit ``max_length`` tokens."""
    longest = max(len(whole.chosen), len(whole.rejected))
    prompt = cut_prompt(whole.prompt, longest, max_length, bos)
    room = max(max_length - len(prompt), 0)
    return _Tokens(prompt, whole.chosen[:room], whole.rejected[:room])


def _rows_of(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row numbers 2i, 2i + 1 of pairs i, shape (2 * num_pairs,)."""
    return np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)


PREFERENCES = RecordKind(
    roles=("prompt", "chosen", "rejected"),
    record=Pair,
    make=make_pairs,
    refused=("bad",),  # pairs with equal answers are always left out, as they teach nothing
    codec=Codec(
        name="pairs",
        columns=("messages", "chosen", "rejected"),
        encode=lambda records, *options: encode_pairs(
            [Pair(context, chosen, rejected, "", "") for context, chosen, rejected in records],
            *options,
        ),
        pack=lambda pairs: (pairs.rows, asdict(pairs.report)),
        unpack=lambda rows, report: EncodedPairs(rows, PairReport(**report)),
    ),
    rendered=lambda pair, *options: [
        *zip(
            ("chosen", "rejected"),
            render_answers(pair.messages, [pair.chosen, pair.rejected], *options),
            strict=True,
        )
    ],
)
