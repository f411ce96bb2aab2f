"""Extracts Python source from a model's answer."""

import re
from textwrap import dedent, indent

_BLOCK = re.compile(r"```[ \t]*[\w+-]*[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)
_MARKS = ("[BEGIN]", "<code>", "[PYTHON]")
_ENDS = ("[DONE]", "</code>", "[/PYTHON]")


def code_of(answer: str, function: str = "") -> str:
    """The code in an answer: the first fenced block that defines `function`, or the first block.

    An answer without a block is taken as code; an unclosed block extends to the end.
    """
    blocks: list[str] = _BLOCK.findall(answer)
    if blocks:
        return next((block for block in blocks if function and defines(block, function)), blocks[0])
    for mark, end in zip(_MARKS, _ENDS, strict=True):
        if mark in answer:
            answer = answer.partition(mark)[2]
        answer = answer.partition(end)[0]
    return answer


def defines(code: str, function: str) -> bool:
    """Whether code contains the definition of `function`, at any indentation."""
    return (
        re.search(rf"^[ \t]*(async[ \t]+)?def[ \t]+{re.escape(function)}\b", code, re.M) is not None
    )


def complete_source(answer: str, start: str, preamble: str, function: str) -> str:
    """A complete program from an answer to "complete this function".

    A complete function is appended to the preamble, and a function body to the start.

    Args:
        start: the prompt's code: everything before the function's body.
        preamble: the imports and helpers before the function.
        function: its name.
    """
    code = code_of(answer, function)
    if defines(code, function):
        return f"{preamble}\n{dedent(code)}"
    return start + as_body(code)


def as_body(code: str) -> str:
    """Code indented by four spaces, unless its first line is already indented."""
    lines = code.strip("\r\n")
    return lines if lines[:1].isspace() else indent(lines, "    ")
