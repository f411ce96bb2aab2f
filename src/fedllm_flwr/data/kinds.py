"""What a training task tells the data layer: its columns, its records and its examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.data.columns import Mapping
from fedllm_flwr.data.faults import Faults
from fedllm_flwr.data.preprocessing import Preprocessed
from fedllm_flwr.data.token_cache import Codec
from fedllm_flwr.data.tokens import TokenArray

if TYPE_CHECKING:
    import datasets


class Report(Protocol):
    """What became of records when they were encoded."""

    @property
    def losses(self) -> str:
        """What did not fit, in words; empty if all did."""


class Examples(Protocol):
    """Encoded records of any task: what a client draws from and trains on."""

    @property
    def report(self) -> Report:
        """What became of the records."""

    @property
    def tokens(self) -> TokenArray:
        """The tokens of all examples, flat."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example, of the longest row where it has several, (num_examples,)."""

    @property
    def source(self) -> NDArray[np.int64]:
        """Index of the record that each example came from, (num_examples,)."""

    def __len__(self) -> int:
        """Number of examples."""

    def take(self, examples: NDArray[np.int64]) -> Self:
        """The chosen examples, in the order given."""

    def num_tokens_of(self, examples: NDArray[np.int64]) -> int:
        """Tokens of the chosen examples together."""


@dataclass(frozen=True)
class RecordKind:
    """Everything in which the records of one task differ from those of another."""

    roles: tuple[str, ...]  # of data.columns, that its records use
    make: Callable[[Preprocessed, Mapping], tuple[list[Any], Faults]]
    columns: dict[str, str]  # column of the data set -> its type; the fields of a record
    refused: tuple[str, ...]  # kinds of faults that data.on_bad_record=error refuses
    codec: Codec[Any]

    def to_dataset(self, records: Sequence[Any]) -> "datasets.Dataset":
        """Records as a data set with the columns of this kind."""
        import datasets

        turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
        features = {
            name: datasets.List(turn) if dtype == "messages" else datasets.Value(dtype)
            for name, dtype in self.columns.items()
        }
        values = {name: [getattr(record, name) for record in records] for name in self.columns}
        return datasets.Dataset.from_dict(values, features=datasets.Features(features))

    def count_unscored(self, records: Sequence[Any]) -> int:
        """Records whose answer is none of data.labels, where records have such an answer."""
        return sum(record.choice < 0 for record in records) if "choice" in self.columns else 0


def answer_columns(records: "datasets.Dataset") -> list[str]:
    """Columns of text that a data set has beside its messages, such as answers to them."""
    attributes = ("label", "client")
    return [
        name
        for name, feature in records.features.items()
        if name not in attributes and getattr(feature, "dtype", None) == "string"
    ]
