"""Answers to mathematical problems, parsed from generated text."""

import re
from collections.abc import Sequence
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_LETTER = re.compile(r"\b([A-E])\b(?!')")
_STATED = re.compile(r"answer\s+is\s*:?\s*\(?([A-E])\b", re.IGNORECASE)


def svamp_results(row: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the answer's last number is correct."""
    found = last_number(results[0])
    right = found is not None and abs(found - float(row["Answer"])) < 1e-6
    return {"exact_match": float(right), "unparsable": float(found is None)}


def aqua_results(row: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the answer's letter is correct."""
    letter = chosen_letter(results[0])
    return {
        "exact_match": float(letter == row["correct"]),
        "unparsable": float(letter is None),
    }


def last_number(text: str) -> float | None:
    """The last number of a text; None if there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def chosen_letter(text: str) -> str | None:
    """The letter after "answer is", otherwise the only separate letter from A to E."""
    stated = _STATED.findall(text)
    if stated:
        letter: str = stated[-1].upper()
        return letter
    alone = set(_LETTER.findall(text))
    return alone.pop() if len(alone) == 1 else None
