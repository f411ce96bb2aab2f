"""From raw records to preference pairs: a shared context, a chosen and a rejected answer."""

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
)
from fedllm_flwr.data.preprocessing import Preprocessed, is_transcript
from fedllm_flwr.data.record_files import Record
from fedllm_flwr.data.records import Messages, parse_turn
from fedllm_flwr.errors import DataError


class Pair(NamedTuple):
    """One usable record."""

    messages: Messages  # the shared context: [system,] user, assistant, ..., user
    chosen: str  # the preferred next turn of the assistant
    rejected: str
    label: str  # class of the record, "" if it has none
    client: str  # value of the partition or client column, "" if there is none


class ColumnAnswer(NamedTuple):
    """The answer in a column, and the turns before it in the same column."""

    context: Messages
    text: str


def make_pairs(rows: Preprocessed, mapping: Mapping, present: Columns) -> tuple[list[Pair], Faults]:
    """The usable records as pairs, in order, and the faults of the others.

    chosen and rejected are either texts that answer the column prompt, or lists of turns that end
    with the answer and may replace the prompt.

    Args:
        present: columns of the records' file.

    Raises:
        DataError: no record of the file has a mapped column.
    """
    _require_columns(mapping, present)
    mapping = resolve_attributes(mapping, present)
    return make_usable(rows, partial(_make_pair, mapping=mapping))


def _require_columns(mapping: Mapping, present: Columns) -> None:
    columns, key = mapping.columns, mapping.columns_key
    for role, name in (("chosen", columns.chosen), ("rejected", columns.rejected)):
        if name is None:
            raise DataError(f"{key}.{role} is null; name the column of the {role} answers")
        if name not in present:
            raise _missing_answers(mapping, f"{key}.{role}", name, present)
    prompt = columns.prompt
    if prompt is None or prompt in present:
        return
    answers = present.values.get(columns.chosen or "", {})
    # The default name may be missing if the answers' columns include the preceding turns.
    if prompt != ColumnsConfig.prompt or answers.keys() <= {str}:
        error = missing_column(mapping.source, f"{key}.prompt", prompt, present)
        if is_transcript(answers.get(str)):
            raise DataError(
                f"{error}; for dialogues as in HH-RLHF: data.preprocessing=hh_rlhf",
                error.shareable,
            )
        raise error


def _missing_answers(mapping: Mapping, key: str, name: str, present: set[str]) -> DataError:
    columns = mapping.columns
    chats = [columns.messages, *CHAT_COLUMNS]
    if {columns.instruction, columns.output} <= present or present.intersection(chats):
        return wrong_kind(mapping.source, "instructions", "preference pairs", "sft", present)
    return missing_column(mapping.source, key, name, present)


def _make_pair(row: Record, mapping: Mapping) -> Pair:
    columns = mapping.columns
    chosen = answer_in(row, columns.chosen or "")
    rejected = answer_in(row, columns.rejected or "")
    context = context_of(row, columns, chosen, rejected)
    if chosen.text.strip() == rejected.text.strip():
        raise UnusableRecord("the chosen answer equals the rejected one", "equal")
    label = attribute_of(row, mapping.label)
    return Pair(context, chosen.text, rejected.text, label, client_of(row, mapping))


def answer_in(row: Record, column: str) -> ColumnAnswer:
    """The answer in a column: a text, or the last turn of a list of turns."""
    value = row.get(column)
    if isinstance(value, list) and value:
        *context, last = _join_turns(value)
        if last["role"] != "assistant":
            raise UnusableRecord(f"column {column!r} does not end with a turn of the assistant")
        answer = ColumnAnswer(context, last["content"])
    elif isinstance(value, str):
        require_unicode(value)
        answer = ColumnAnswer([], value)
    elif value is None or value == []:
        raise UnusableRecord(f"column {column!r} is missing", "empty")
    else:
        raise UnusableRecord(
            f"column {column!r} is {type(value).__name__}, not text or a list of turns"
        )
    if not answer.text.strip():
        raise UnusableRecord(f"the answer in column {column!r} is empty", "empty")
    return answer


def _join_turns(turns: list[object]) -> Messages:
    """Turns as messages; consecutive turns of one role are joined with blank lines."""
    messages: Messages = []
    for message in map(parse_turn, turns):
        if messages and messages[-1]["role"] == message["role"]:
            contents = [messages[-1]["content"], message["content"]]
            messages[-1] = {**message, "content": "\n\n".join(filter(None, contents))}
        else:
            messages.append(message)
    return messages


def context_of(row: Record, columns: ColumnsConfig, *answers: ColumnAnswer) -> Messages:
    """The turns before the answers; the prompt column and the answers' columns must agree."""
    contexts = [answer.context for answer in answers if answer.context]
    context = contexts[0] if contexts else []
    if not all(_same(context, other) for other in contexts):
        raise UnusableRecord("chosen and rejected do not answer the same dialogue")
    prompt = row.get(columns.prompt) if columns.prompt else None
    if isinstance(prompt, list) and prompt:
        turns = _join_turns(prompt)
        if context and not _same(context, turns):
            raise UnusableRecord(f"column {columns.prompt!r} is not what precedes the answers")
        context = turns
    elif isinstance(prompt, str):
        require_unicode(prompt)
        asked = {turn["content"].strip() for turn in context if turn["role"] == "user"}
        if context and prompt.strip() and prompt.strip() not in asked:
            raise UnusableRecord(f"column {columns.prompt!r} is not what precedes the answers")
        context = context or _asked(prompt, columns.prompt)
    elif prompt is not None and prompt != []:
        kind = type(prompt).__name__
        raise UnusableRecord(f"column {columns.prompt!r} is {kind}, not text or a list of turns")
    _check_context(context)
    return context


def _asked(prompt: str, column: str | None) -> Messages:
    if not prompt.strip():
        raise UnusableRecord(f"column {column!r} is empty", "empty")
    return [{"role": "user", "content": prompt}]


def _same(one: Messages, other: Messages) -> bool:
    """Whether two dialogues agree turn by turn, up to white space around the turns."""
    stripped = [
        [(turn["role"], turn["content"].strip()) for turn in turns] for turns in (one, other)
    ]
    return stripped[0] == stripped[1]


def _check_context(context: Messages) -> None:
    if not context:
        raise UnusableRecord("nothing precedes the answers: no prompt, and no turn before them")
    roles = [message["role"] for message in context]
    after_system = roles[1:] if roles[0] == "system" else roles
    if after_system[:1] == ["assistant"]:
        raise UnusableRecord("the dialogue starts with the assistant")
    if "system" in after_system:
        raise UnusableRecord("a system turn comes after the start of the dialogue")
    if after_system[-1:] != ["user"]:
        raise UnusableRecord("the turn before the answers is not the user's")
