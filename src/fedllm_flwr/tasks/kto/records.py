"""From raw records to judged answers: a context with a desirable or an undesirable answer.

A record of a preference data set gives one answer of each kind, which are then no longer paired.
"""

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
from fedllm_flwr.data.faults import Faults, UnusableRecord, attribute_of, client_of, make_usable
from fedllm_flwr.data.preprocessing import Preprocessed
from fedllm_flwr.data.record_files import Record
from fedllm_flwr.data.records import Messages
from fedllm_flwr.errors import DataError
from fedllm_flwr.tasks.preferences.records import answer_in, context_of, make_pairs

_VERDICTS = {
    "true": True,
    "1": True,
    "1.0": True,
    "false": False,
    "0": False,
    "0.0": False,
}  # lower-case text, as spreadsheets and CSV have no booleans


class Judged(NamedTuple):
    """One usable record: one answer, or both answers of a preference pair."""

    messages: Messages  # the context: [system,] user, assistant, ..., user
    desirable: str  # "": none
    undesirable: str  # "": none
    label: str  # class of the record, otherwise the kinds of answers that it has
    client: str  # value of the partition or client column, "" if there is none


def make_judged(
    rows: Preprocessed, mapping: Mapping, present: Columns
) -> tuple[list[Judged], Faults]:
    """The usable records as judged answers, in order, and the faults of the others.

    Records have the columns of an answer and of its label (true, false, 1 or 0), or a chosen and a
    rejected answer, which become one answer of each kind.

    Args:
        present: columns of the records' file.

    Raises:
        DataError: no record of the file has a mapped column.
    """
    columns, key = mapping.columns, mapping.columns_key
    wanted = {"answer": columns.answer, "desirable": columns.desirable}
    if {columns.chosen, columns.rejected} <= present and not {*wanted.values()} <= present:
        pairs, faults = make_pairs(rows, mapping, present)
        return [Judged(*pair) for pair in pairs], faults
    are_texts = present.values.get(columns.answer or "", {}).keys() <= {str}
    # The default name may be missing if the answers' columns include the preceding turns.
    if columns.prompt is not None and (are_texts or columns.prompt != ColumnsConfig.prompt):
        wanted["prompt"] = columns.prompt
    for role, name in wanted.items():
        if name is None:
            raise DataError(f"{key}.{role} is null; name its column")
        if name not in present:
            chats = {columns.messages, *CHAT_COLUMNS}
            if {columns.instruction, columns.output} <= present or present & chats:
                raise wrong_kind(mapping.source, "instructions", "judged answers", "sft", present)
            raise missing_column(mapping.source, f"{key}.{role}", name, present)
    mapping = resolve_attributes(mapping, present)
    return make_usable(rows, partial(_make_judged, mapping=mapping))


def _make_judged(row: Record, mapping: Mapping) -> Judged:
    columns = mapping.columns
    answer = answer_in(row, columns.answer or "")
    context = context_of(row, columns, answer)
    verdict = row.get(columns.desirable or "")
    if verdict is None or verdict == "":
        raise UnusableRecord(f"column {columns.desirable!r} is missing", "empty")
    is_desirable = _VERDICTS.get(str(verdict).strip().casefold())
    if is_desirable is None:
        raise UnusableRecord(f"column {columns.desirable!r} is neither true nor false")
    label = attribute_of(row, mapping.label)
    if mapping.label is None:
        label = "desirable" if is_desirable else "undesirable"
    texts = (answer.text, "") if is_desirable else ("", answer.text)
    return Judged(context, *texts, label, client_of(row, mapping))
