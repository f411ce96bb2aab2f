"""Judged answers as training examples: a token sequence ("row") and its desirability."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.data.encode import KEEP, Encoded, flatten, require_truncation
from fedllm_flwr.data.kinds import RecordKind
from fedllm_flwr.data.templates import Segment, Tokenizer, render_answers
from fedllm_flwr.data.token_cache import Codec
from fedllm_flwr.data.tokens import TokenArray, require_eos, tokenise
from fedllm_flwr.tasks.kto.records import Judged, make_judged
from fedllm_flwr.tasks.preferences.encoding import TokenRow, cut_prompt, joined, split

_EMPTY: TokenRow = (np.empty(0, np.int32), np.empty(0, np.bool_))


@dataclass(frozen=True)
class AnswerReport:
    """Truncation report: num_answers = examples + dropped."""

    num_answers: int
    prompts_cut: int  # answers whose prompt lost its start
    answers_cut: int  # answers that lost their end
    dropped: int  # too long under truncation=drop, or nothing left after truncation

    @property
    def summary(self) -> str:
        """The truncation report as text; "" if every answer fits."""
        if not (self.prompts_cut or self.answers_cut or self.dropped):
            return ""
        return (
            f"of {self.num_answers} answers {self.prompts_cut} lost the start of their prompt, "
            f"{self.answers_cut} were cut, {self.dropped} left out"
        )


@dataclass(frozen=True)
class EncodedAnswers:
    """Tokenised answers, one row each; ``supervised`` marks only the answer, with its EOS."""

    rows: Encoded
    desirable: NDArray[np.bool_]  # (num_examples,)
    report: AnswerReport

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, examples: NDArray[np.int64]) -> "EncodedAnswers":
        """The selected answers, in the given order, with a report of only these answers."""
        report = AnswerReport(len(examples), 0, 0, 0)
        return EncodedAnswers(self.rows.take(examples), self.desirable[examples], report)

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
        """Tokens per row, shape (num_examples,)."""
        return self.rows.lengths

    @property
    def source(self) -> NDArray[np.int64]:
        """Index of the record of each answer, shape (num_examples,)."""
        return self.rows.source

    def num_tokens_of(self, examples: NDArray[np.int64]) -> int:
        """Total number of tokens of the selected rows."""
        return self.rows.num_tokens_of(examples)

    def mismatched(self, order: NDArray[np.int64], max_length: int) -> Encoded:
        """Pair each prompt with the previous example's answer, and the first with the last's.

        KTO estimates the KL divergence on these rows; long rows lose the end of their answer.

        Args:
            order: indices of the examples to mix, in order, (count,).
        """
        parts = [split(*self.rows[int(i)]) for i in order]
        rows = []
        for (prompt, _), (_, answer) in zip(parts, [parts[-1], *parts[:-1]], strict=True):
            tokens, supervised = joined(prompt, answer)
            rows.append((tokens[:max_length], supervised[:max_length]))
        return flatten(rows, order.tolist(), len(rows), truncated=0)


def encode_answers(
    records: Sequence[Judged],
    tokenizer: Tokenizer,
    template: str,
    max_length: int,
    truncation: str = "right",
) -> EncodedAnswers:
    """Render and tokenise answers for training, at most ``max_length`` tokens per row.

    If a row is too long, the start of the prompt is cut, down to half of ``max_length``; then the
    end of the answer is cut if it still does not fit. truncation=drop leaves out rows that are too
    long; keep leaves out none.

    Raises:
        ConfigError: an option is unknown.
        ModelError: the tokenizer is unusable.
    """
    require_truncation(truncation)
    answers = [
        (i, is_desirable, text)
        for i, record in enumerate(records)
        for is_desirable, text in ((True, record.desirable), (False, record.undesirable))
        if text
    ]
    rendered = [
        render_answers(records[i].messages, [text], template, tokenizer)[0]
        for i, _, text in answers
    ]
    require_eos(tokenizer)
    kept: list[TokenRow] = []
    source, desirable = [], []
    prompts_cut = answers_cut = rows_cut = 0
    for (i, is_desirable, _), row in zip(
        answers, tokenise(rendered, tokenizer, max_length), strict=True
    ):
        prompt, answer = split(*row)
        fitted = cut_prompt(prompt, len(answer), max_length, tokenizer.bos_token_id)
        whole = joined(fitted, answer[: max(max_length - len(fitted), 0)])
        is_cut = len(whole[0]) < len(row[0])
        if truncation != KEEP and (not whole[1].any() or (is_cut and truncation == "drop")):
            continue
        prompts_cut += len(fitted) < len(prompt)
        answers_cut += int(whole[1].sum()) < len(answer)
        rows_cut += is_cut
        kept.append(whole)
        source.append(i)
        desirable.append(is_desirable)
    report = AnswerReport(len(answers), prompts_cut, answers_cut, len(answers) - len(kept))
    rows = flatten(kept, source, len(answers), rows_cut)
    return EncodedAnswers(rows, np.array(desirable, np.bool_), report)


def _packed(answers: EncodedAnswers) -> tuple[Encoded, dict[str, int]]:
    """Two rows per record, the desirable and the undesirable answer; a missing answer is empty.

    The parity of a row's index therefore gives its desirability.
    """
    lengths = np.zeros(2 * (int(answers.source.max(initial=-1)) + 1), np.int64)
    lengths[2 * answers.source + ~answers.desirable] = answers.lengths
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    report = replace(answers.rows.report, num_examples=len(lengths))
    rows = replace(
        answers.rows, offsets=offsets, source=np.arange(len(lengths)) // 2, report=report
    )
    return rows, asdict(answers.report)


def _unpacked(rows: Encoded, report: dict[str, int]) -> EncodedAnswers:
    there = np.flatnonzero(rows.lengths)
    rows = replace(
        rows,
        offsets=np.concatenate([rows.offsets[:1], rows.offsets[1:][there]]),
        source=rows.source[there],
        report=replace(rows.report, num_examples=len(there)),
    )
    return EncodedAnswers(rows, there % 2 == 0, AnswerReport(**report))


def _rendered(
    record: Judged, template: str, tokenizer: Tokenizer
) -> list[tuple[str, list[Segment]]]:
    answers = {"desirable": record.desirable, "undesirable": record.undesirable}
    texts = {name: text for name, text in answers.items() if text}
    both = render_answers(record.messages, list(texts.values()), template, tokenizer)
    return list(zip(texts, both, strict=True))


JUDGED = RecordKind(
    roles=("prompt", "answer", "desirable", "chosen", "rejected"),
    record=Judged,
    make=make_judged,
    refused=("empty", "bad"),
    codec=Codec(
        name="judged",
        columns=("messages", "desirable", "undesirable"),
        encode=lambda records, *options: encode_answers(
            [Judged(context, good, bad, "", "") for context, good, bad in records], *options
        ),
        pack=_packed,
        unpack=_unpacked,
    ),
    rendered=_rendered,
)
