"""Interface between a training task and the data layer: columns, records, examples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.data.columns import Columns, Mapping
from fedllm_flwr.data.faults import Faults
from fedllm_flwr.data.preprocessing import Preprocessed
from fedllm_flwr.data.templates import Segment, Tokenizer
from fedllm_flwr.data.token_cache import Codec
from fedllm_flwr.data.tokens import TokenArray


class Report(Protocol):
    """Truncation report of encoded records."""

    @property
    def summary(self) -> str:
        """The report as text; "" if nothing was truncated or dropped."""


class Examples(Protocol):
    """Encoded training examples of any task."""

    @property
    def report(self) -> Report:
        """Truncation report."""

    @property
    def tokens(self) -> TokenArray:
        """The tokens of all examples, flat."""

    @property
    def token_counts(self) -> NDArray[np.int64]:
        """Number of occurrences of each token id, (largest id + 1,)."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example, (num_examples,); of the longest sequence if it has several."""

    @property
    def source(self) -> NDArray[np.int64]:
        """Index of the record of each example, (num_examples,)."""

    def __len__(self) -> int:
        """Number of examples."""

    def take(self, examples: NDArray[np.int64]) -> Self:
        """The selected examples, in the given order."""

    def num_tokens_of(self, examples: NDArray[np.int64]) -> int:
        """Total number of tokens of the selected examples."""


@dataclass(frozen=True)
class RecordKind:
    """The record type of a task: its columns, its parsing and its encoding."""

    roles: tuple[str, ...]  # roles of data.columns that its records use
    record: Any  # type of a usable record, a NamedTuple
    make: Callable[[Preprocessed, Mapping, Columns], tuple[list[Any], Faults]]
    refused: tuple[str, ...]  # kinds of faults that data.on_bad_record=error refuses
    codec: Codec[Any]
    # A record as the model sees it: a name and the segments of each of its token sequences.
    rendered: Callable[[Any, str, Tokenizer], list[tuple[str, list[Segment]]]]
