"""From raw records to examples: chat messages with a label and a client attribute."""

from functools import partial
from typing import NamedTuple

from fedllm_flwr.config.schema import ColumnsConfig
from fedllm_flwr.data.columns import (
    CHAT_COLUMNS,
    Columns,
    Mapping,
    missing_column,
    resolve_attributes,
    wrong_kind,
)
from fedllm_flwr.data.faults import (
    Faults,
    UnusableRecord,
    attribute_of,
    client_of,
    make_usable,
    require_unicode,
    text_of,
)
from fedllm_flwr.data.preprocessing import Preprocessed
from fedllm_flwr.data.record_files import Record
from fedllm_flwr.data.records import Messages, parse_turn
from fedllm_flwr.errors import DataError


class Example(NamedTuple):
    """One usable record."""

    messages: Messages
    label: str  # class of the record, "" if it has none
    client: str  # value of the partition or client column, "" if there is none
    choice: int  # index of the answer in data.labels, -1 if it is not one of them


def make_examples(
    rows: Preprocessed, mapping: Mapping, present: Columns
) -> tuple[list[Example], Faults]:
    """The usable records as examples, in order, and the faults of the others.

    Args:
        present: columns of the records' file.

    Raises:
        DataError: no record of the file has a mapped column.
    """
    _require_columns(mapping, present)
    mapping = resolve_attributes(mapping, present)
    choices = {_normalise_answer(label): i for i, label in enumerate(mapping.labels)}
    return make_usable(rows, partial(_make_example, mapping=mapping, choices=choices))


def _require_columns(mapping: Mapping, present: set[str]) -> None:
    columns, key = mapping.columns, mapping.columns_key
    if columns.messages is not None:
        required = {"messages": columns.messages}
    else:
        required = {"instruction": columns.instruction or "", "output": columns.output or ""}
        # The default name may be missing: most data sets without extra input have no such column.
        if columns.input is not None and columns.input != ColumnsConfig.input:
            required["input"] = columns.input
    for role, name in required.items():
        if name not in present:
            raise _missing_role(mapping, f"{key}.{role}", name, present)


def _missing_role(mapping: Mapping, key: str, name: str, present: set[str]) -> DataError:
    columns = mapping.columns
    if {columns.chosen, columns.rejected} <= present:
        return wrong_kind(mapping.source, "preference pairs", "instructions", "dpo", present)
    error = missing_column(mapping.source, key, name, present)
    chat = [column for column in CHAT_COLUMNS if column in present]
    if chat and columns.messages is None:
        return DataError(
            f"{error} (for chats: {mapping.columns_key}.messages={chat[0]})", error.shareable
        )
    return error


def _make_example(row: Record, mapping: Mapping, choices: dict[str, int]) -> Example:
    columns = mapping.columns
    if columns.messages is not None:
        messages = _chat(row.get(columns.messages))
    else:
        messages = _single_turn(row, columns)
    choice = choices.get(_normalise_answer(messages[-1]["content"]), -1) if choices else -1
    label = attribute_of(row, mapping.label)
    if mapping.label is None and choice >= 0:
        label = mapping.labels[choice]
    return Example(messages, label, client_of(row, mapping), choice)


def _normalise_answer(text: str) -> str:
    return text.strip().rstrip(".").casefold()


def _single_turn(row: Record, columns: ColumnsConfig) -> Messages:
    instruction = text_of(row, columns.instruction or "")
    answer = text_of(row, columns.output or "")
    extra = row.get(columns.input) if columns.input else None
    if extra is not None and not isinstance(extra, str):
        raise UnusableRecord(f"column {columns.input!r} is {type(extra).__name__}, not text")
    prompt = f"{instruction} {extra}" if extra else instruction
    require_unicode(prompt + answer)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _chat(turns: object) -> Messages:
    """Chat turns as messages: [system,] user, assistant, user, assistant, ..."""
    if turns is None or turns == []:
        raise UnusableRecord("the chat has no turns")
    if not isinstance(turns, list):
        raise UnusableRecord("the chat is not a list of turns")
    messages = [parse_turn(turn) for turn in turns]
    roles = [message["role"] for message in messages]
    turns_after_system = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in turns_after_system:
        raise UnusableRecord("the chat has no assistant turn")
    pairs = len(turns_after_system) // 2
    if turns_after_system != ["user", "assistant"] * pairs:
        raise UnusableRecord(f"user and assistant do not alternate ({', '.join(roles[:6])})")
    if any(not message["content"].strip() for message in messages):
        raise UnusableRecord("a turn of the chat is empty", "empty")
    return messages
