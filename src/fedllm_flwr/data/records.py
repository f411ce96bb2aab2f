"""From raw records to examples: chat messages with a label and a client attribute."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import NamedTuple

from fedllm_flwr.config.schema import ColumnsConfig
from fedllm_flwr.data.files import Record
from fedllm_flwr.data.preprocessing import Preprocessed
from fedllm_flwr.errors import DataError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Messages = list[Message]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
CHAT_COLUMNS = ("messages", "conversations", "conversation")
NAMED_IN_ERRORS = 5


class Example(NamedTuple):
    """One usable record."""

    messages: Messages
    label: str  # class of the record, "" without one
    client: str  # value of the partition's (or the set's own client) column, "" without one
    choice: int  # index of the answer in data.labels, -1 when it is none of them


@dataclass(frozen=True)
class AttributeColumn:
    """A column that is kept beside the messages, and the configuration key that names it."""

    name: str
    key: str
    required: bool


@dataclass(frozen=True)
class Mapping:
    """Which columns of a source play which role."""

    source: str  # file or hub set, for messages
    columns: ColumnsConfig
    columns_key: str = "data.columns"
    label: AttributeColumn | None = None
    client: AttributeColumn | None = None
    labels: list[str] = field(default_factory=list)


class UnusableRecord(Exception):  # noqa: N818 - a verdict on one record, always caught here
    """Why one record cannot be used; ``empty`` when a text is merely missing."""

    def __init__(self, reason: str, empty: bool = False) -> None:
        super().__init__(reason)
        self.empty = empty


@dataclass
class Faults:
    """Records that cannot be used: (1-based record number, reason)."""

    empty: list[tuple[int, str]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)


def make_examples(rows: Preprocessed, mapping: Mapping) -> tuple[list[Example], Faults]:
    """The usable records as examples, in order, and the faults of the others.

    Raises DataError when a mapped column is in no record at all.
    """
    present = _columns_present(rows)
    mapping = _resolve(mapping, present)
    choices = {_normalise_answer(label): i for i, label in enumerate(mapping.labels)}
    examples, faults = [], Faults()
    for number, row in enumerate(rows, start=1):
        if row is None:
            continue
        try:
            examples.append(_make_example(row, mapping, choices))
        except UnusableRecord as fault:
            (faults.empty if fault.empty else faults.bad).append((number, str(fault)))
    return examples, faults


def refuse_faults(source: str, num_records: int, faults: Faults) -> None:
    """Raise DataError that names the first faulty records, if there are any."""
    found = sorted(faults.empty + faults.bad)
    if not found:
        return
    named = "; ".join(f"record {number}: {reason}" for number, reason in found[:NAMED_IN_ERRORS])
    more = f"; and {len(found) - NAMED_IN_ERRORS} more" if len(found) > NAMED_IN_ERRORS else ""
    raise DataError(
        f"{source}: {len(found)} of {num_records} records cannot be used ({named}{more}). "
        f"Fix them, or leave them out with data.on_bad_record=skip"
    )


def unused_columns(rows: Preprocessed, mapping: Mapping) -> list[str]:
    """Columns of the source that no role is mapped to, sorted."""
    columns = mapping.columns
    used = {getattr(columns, item.name) for item in fields(columns)}
    used |= {column.name for column in (mapping.label, mapping.client) if column}
    return sorted(_columns_present(rows) - used)


def missing_column(source: str, key: str, name: str, present: Iterable[str]) -> DataError:
    """The error for a column that a key names and the source lacks."""
    columns = sorted(present)
    close = get_close_matches(name, columns, n=1)
    hint = f"did you mean {key}={close[0]}?" if close else f"set {key} to one of them"
    return DataError(
        f"{source}: {key}={name}, but there is no such column; {hint} "
        f"(columns: {', '.join(columns)})"
    )


def _columns_present(rows: Preprocessed) -> set[str]:
    present: set[str] = set()
    for row in rows:
        if row is not None:
            present.update(row)
    return present


def _resolve(mapping: Mapping, present: set[str]) -> Mapping:
    """The mapping without roles that may be absent and are; refuses those that may not."""
    columns, key = mapping.columns, mapping.columns_key
    if columns.messages is not None:
        required = {"messages": columns.messages}
    else:
        required = {"instruction": columns.instruction or "", "output": columns.output or ""}
        # The default name may be absent: most sets without extra input have no such column.
        if columns.input is not None and columns.input != ColumnsConfig.input:
            required["input"] = columns.input
    for role, name in required.items():
        if name not in present:
            raise _missing_role(mapping, f"{key}.{role}", name, present)
    attributes = {}
    for role in ("label", "client"):
        column: AttributeColumn | None = getattr(mapping, role)
        if column and column.name not in present:
            if column.required:
                raise missing_column(mapping.source, column.key, column.name, present)
            column = None
        attributes[role] = column
    return Mapping(mapping.source, columns, key, **attributes, labels=mapping.labels)


def _missing_role(mapping: Mapping, key: str, name: str, present: set[str]) -> DataError:
    error = missing_column(mapping.source, key, name, present)
    chat = [column for column in CHAT_COLUMNS if column in present]
    if chat and mapping.columns.messages is None:
        return DataError(f"{error} (for chats: {mapping.columns_key}.messages={chat[0]})")
    return error


def _make_example(row: Record, mapping: Mapping, choices: dict[str, int]) -> Example:
    columns = mapping.columns
    if columns.messages is not None:
        messages = _chat(row.get(columns.messages))
    else:
        messages = _single_turn(row, columns)
    choice = choices.get(_normalise_answer(messages[-1]["content"]), -1) if choices else -1
    label = _attribute(row, mapping.label)
    if mapping.label is None and choice >= 0:
        label = mapping.labels[choice]
    client = _attribute(row, mapping.client)
    if mapping.client and mapping.client.required and not client:
        raise UnusableRecord(f"no value in column {mapping.client.name!r} ({mapping.client.key})")
    return Example(messages, label, client, choice)


def _attribute(row: Record, column: AttributeColumn | None) -> str:
    value = row.get(column.name) if column else None
    text = "" if value is None else str(value)
    _require_unicode(text)
    return text


def _normalise_answer(text: str) -> str:
    return text.strip().rstrip(".").casefold()


def _single_turn(row: Record, columns: ColumnsConfig) -> Messages:
    instruction = _text(row, columns.instruction or "")
    answer = _text(row, columns.output or "")
    extra = row.get(columns.input) if columns.input else None
    if extra is not None and not isinstance(extra, str):
        raise UnusableRecord(f"column {columns.input!r} is {type(extra).__name__}, not text")
    prompt = f"{instruction} {extra}" if extra else instruction
    _require_unicode(prompt + answer)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _require_unicode(text: str) -> None:
    """JSON may escape half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnusableRecord("half of a surrogate pair, such as \\ud83d, in its text") from None


def _text(row: Record, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise UnusableRecord(f"column {column!r} is missing", empty=True)
    if not isinstance(value, str):
        raise UnusableRecord(f"column {column!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise UnusableRecord(f"column {column!r} is empty", empty=True)
    return value


def _chat(turns: object) -> Messages:
    """Chat turns as messages: [system,] user, assistant, user, assistant, ..."""
    if not isinstance(turns, list) or not turns:
        raise UnusableRecord("the chat is not a list of turns")
    messages = [_turn(turn) for turn in turns]
    roles = [message["role"] for message in messages]
    turns_after_system = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in turns_after_system:
        raise UnusableRecord("the chat has no assistant turn")
    pairs = len(turns_after_system) // 2
    if turns_after_system != ["user", "assistant"] * pairs:
        raise UnusableRecord(f"user and assistant do not alternate ({', '.join(roles[:6])})")
    if any(not message["content"].strip() for message in messages):
        raise UnusableRecord("a turn of the chat is empty", empty=True)
    return messages


def _turn(turn: object) -> Message:
    if not isinstance(turn, dict):
        raise UnusableRecord("a turn of the chat is not an object with role and content")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in ROLES:
        raise UnusableRecord(f"unknown role {role!r} in the chat; known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UnusableRecord("a turn of the chat has no text")
    _require_unicode(content)
    return {"role": ROLES[role], "content": content}
