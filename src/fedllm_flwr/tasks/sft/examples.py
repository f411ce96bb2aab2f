"""The record kind of instructions: how the data layer reads and encodes them."""

from fedllm_flwr.data.encode import Encoded, encode
from fedllm_flwr.data.kinds import RecordKind
from fedllm_flwr.data.templates import render
from fedllm_flwr.data.token_cache import Codec
from fedllm_flwr.tasks.sft.records import Example, make_examples

CONVERSATIONS: Codec[Encoded] = Codec(
    name="conversations",
    columns=("messages",),
    encode=lambda records, *options: encode([messages for (messages,) in records], *options),
    pack=lambda encoded: (encoded, {}),
    unpack=lambda encoded, _: encoded,
)

INSTRUCTIONS = RecordKind(
    roles=("instruction", "input", "output", "messages"),
    record=Example,
    make=make_examples,
    refused=("empty", "bad"),
    codec=CONVERSATIONS,
    rendered=lambda record, *options: [("", render(record.messages, *options))],
)
