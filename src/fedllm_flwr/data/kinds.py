"""What a task trains on: the kinds of records, from the columns of a file to examples."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fedllm_flwr.data.columns import Mapping
from fedllm_flwr.data.faults import Faults
from fedllm_flwr.data.pairs import EncodedPairs, PairReport, encode_pairs
from fedllm_flwr.data.preferences import Pair, make_pairs
from fedllm_flwr.data.preprocessing import Preprocessed
from fedllm_flwr.data.records import Example, make_examples
from fedllm_flwr.data.token_cache import CONVERSATIONS, Codec

if TYPE_CHECKING:
    import datasets


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


INSTRUCTIONS = RecordKind(
    roles=("instruction", "input", "output", "messages"),
    make=make_examples,
    columns=dict(zip(Example._fields, ("messages", "string", "string", "int32"), strict=True)),
    refused=("empty", "bad"),
    codec=CONVERSATIONS,
)

PAIRS: Codec[EncodedPairs] = Codec(
    name="pairs",
    columns=("messages", "chosen", "rejected"),
    encode=lambda records, *options: encode_pairs(
        [Pair(context, chosen, rejected, "", "") for context, chosen, rejected in records], *options
    ),
    pack=lambda pairs: (pairs.rows, asdict(pairs.report)),
    unpack=lambda rows, report: EncodedPairs(rows, PairReport(**report)),
)

PREFERENCES = RecordKind(
    roles=("prompt", "chosen", "rejected"),
    make=make_pairs,
    columns=dict(
        zip(Pair._fields, ("messages", "string", "string", "string", "string"), strict=True)
    ),
    refused=("bad",),  # pairs without a difference teach nothing and are left out in any case
    codec=PAIRS,
)

KINDS = {"sft": INSTRUCTIONS, "dpo": PREFERENCES}  # by task.name
