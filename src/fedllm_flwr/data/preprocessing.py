"""Named preprocessing of published data sets, as OpenFedLLM does it (arXiv 2402.06954)."""

import re
from collections.abc import Callable, Iterable
from hashlib import blake2b

from fedllm_flwr.config.schema import ColumnsConfig
from fedllm_flwr.data.record_files import Record

# One entry per record read, in order; None marks a record to leave out, such as a duplicate.
Preprocessed = Iterable[Record | None]
Preprocessing = Callable[[Iterable[Record], ColumnsConfig], Preprocessed]

# FinGPT's benchmark files store the finished prompt.
_FINGPT_PROMPT = re.compile(
    r"\s*Instruction:\s*(?P<instruction>.*?)\s*\nInput:\s*(?P<input>.*?)\s*\nAnswer:\s*", re.DOTALL
)

# "\n\nHuman: ...\n\nAssistant: ...": a turn starts where a paragraph starts with its speaker.
_SPEAKER = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def keep(records: Iterable[Record], columns: ColumnsConfig) -> Preprocessed:
    """Records unchanged; a space joins instruction and input when messages are made."""
    return records


def drop_instruction(records: Iterable[Record], columns: ColumnsConfig) -> Preprocessed:
    """MedAlpaca: drop the instruction, which is constant; the question is the input."""
    instruction, question = columns.instruction, columns.input
    for row in records:
        if instruction is None or question is None or question not in row:
            yield row
        else:
            yield {**row, instruction: row[question], question: ""}


def drop_duplicates(records: Iterable[Record], columns: ColumnsConfig) -> Preprocessed:
    """MathInstruct: keep the first record of every instruction."""
    seen: set[bytes] = set()
    for row in records:
        instruction = repr(row.get(columns.instruction or ""))
        digest = blake2b(instruction.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        yield None if digest in seen else row
        seen.add(digest)


def parse_fingpt(records: Iterable[Record], columns: ColumnsConfig) -> Preprocessed:
    """FinGPT: like alpaca; benchmark rows {context, target} are split again."""
    for row in records:
        if "context" not in row or "target" not in row:
            yield row
            continue
        match = _FINGPT_PROMPT.fullmatch(str(row["context"]))
        instruction, text = match.groups() if match else (row["context"], "")
        rest = {key: value for key, value in row.items() if key not in ("context", "target")}
        names = (columns.instruction, columns.input, columns.output)
        parts = zip(names, (instruction, text, row["target"]), strict=True)
        yield {**rest, **{name: value for name, value in parts if name is not None}}


def parse_transcripts(records: Iterable[Record], columns: ColumnsConfig) -> Preprocessed:
    """HH-RLHF: transcripts in the columns of preference pairs become lists of turns."""
    names = [name for name in (columns.prompt, columns.chosen, columns.rejected) if name]
    for row in records:
        turns: dict[str, list[dict[str, str]]] = {}
        for name in names:
            if is_transcript(row.get(name)):  # the space after a speaker is dropped
                _, *parts = _SPEAKER.split(row[name])
                turns[name] = [
                    {"role": _ROLES[speaker], "content": content}
                    for speaker, content in zip(parts[::2], parts[1::2], strict=True)
                ]
        prompt = turns.get(columns.prompt or "")
        if prompt and prompt[-1] == {"role": "assistant", "content": ""}:  # a trailing "Assistant:"
            prompt.pop()
        yield {**row, **turns}


def is_transcript(text: object) -> bool:
    """Whether a text starts with a speaker of HH-RLHF."""
    return isinstance(text, str) and _SPEAKER.match(text) is not None
