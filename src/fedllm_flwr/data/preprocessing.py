"""Named preprocessing of published data sets, as OpenFedLLM does it (arXiv 2402.06954)."""

import re
from collections.abc import Callable

from fedllm_flwr.config.schema import ColumnsConfig
from fedllm_flwr.data.files import Record

# One entry per record read, in order; None marks a duplicate to leave out.
Preprocessed = list[Record | None]
Preprocessing = Callable[[list[Record], ColumnsConfig], Preprocessed]

# FinGPT's benchmark files store the finished prompt.
_FINGPT_PROMPT = re.compile(
    r"\s*Instruction:\s*(?P<instruction>.*?)\s*\nInput:\s*(?P<input>.*?)\s*\nAnswer:\s*", re.DOTALL
)


def keep(records: list[Record], columns: ColumnsConfig) -> Preprocessed:
    """Records as they are; whoever makes messages joins instruction and input by a space."""
    return list(records)


def drop_instruction(records: list[Record], columns: ColumnsConfig) -> Preprocessed:
    """MedAlpaca: the instruction is the same in every record, the question is the input."""
    instruction, question = columns.instruction, columns.input
    if instruction is None or question is None or not any(question in row for row in records):
        return list(records)
    return [{**row, instruction: row.get(question), question: ""} for row in records]


def drop_duplicates(records: list[Record], columns: ColumnsConfig) -> Preprocessed:
    """MathInstruct: keep the first record of every instruction."""
    seen: set[str] = set()
    kept: Preprocessed = []
    for row in records:
        instruction = repr(row.get(columns.instruction or ""))
        kept.append(None if instruction in seen else row)
        seen.add(instruction)
    return kept


def parse_fingpt(records: list[Record], columns: ColumnsConfig) -> Preprocessed:
    """FinGPT: like alpaca; benchmark rows {context, target} are taken apart again."""
    return [_parse_fingpt_row(row, columns) for row in records]


def _parse_fingpt_row(row: Record, columns: ColumnsConfig) -> Record:
    if "context" not in row or "target" not in row:
        return row
    match = _FINGPT_PROMPT.fullmatch(str(row["context"]))
    instruction, text = (match["instruction"], match["input"]) if match else (row["context"], "")
    parts = {
        columns.instruction: instruction,
        columns.input: text,
        columns.output: row["target"],
    }
    rest = {key: value for key, value in row.items() if key not in ("context", "target")}
    return {**rest, **{name: value for name, value in parts.items() if name is not None}}


PREPROCESSING: dict[str, Preprocessing] = {
    "none": keep,
    "alpaca": keep,
    "medalpaca": drop_instruction,
    "mathinstruct": drop_duplicates,
    "fingpt": parse_fingpt,
}
