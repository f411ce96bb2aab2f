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

# "\n\nHuman: ...\n\nAssistant: ...": a turn starts where a paragraph starts with its speaker.
_SPEAKER = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


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


def parse_transcripts(records: list[Record], columns: ColumnsConfig) -> Preprocessed:
    """HH-RLHF: transcripts in the columns of preference pairs become lists of turns."""
    names = [name for name in (columns.prompt, columns.chosen, columns.rejected) if name]
    parsed: Preprocessed = []
    for row in records:
        turns = {name: _turns(row[name]) for name in names if is_transcript(row.get(name))}
        prompt = turns.get(columns.prompt or "")
        if prompt and prompt[-1] == {"role": "assistant", "content": ""}:  # calls for the answer
            prompt.pop()
        parsed.append({**row, **turns})
    return parsed


def is_transcript(text: object) -> bool:
    """Whether a text starts with a speaker of HH-RLHF."""
    return isinstance(text, str) and _SPEAKER.match(text) is not None


def _turns(transcript: str) -> list[dict[str, str]]:
    """Every turn as it stands, without the one space after its speaker."""
    _, *parts = _SPEAKER.split(transcript)
    return [
        {"role": _ROLES[speaker], "content": content}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
