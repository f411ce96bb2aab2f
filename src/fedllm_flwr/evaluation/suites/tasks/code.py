"""Code compared with a reference solution: CoNaLa and ConCode."""

import re
from collections.abc import Sequence
from typing import Any

from fedllm_flwr.evaluation.suites.bleu import bleu_counts

_BLOCK = re.compile(r"```[ \t]*\w*[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)


def written_code(answer: str) -> str:
    """The first fenced block of an answer, or the whole answer."""
    block = _BLOCK.search(answer)
    return (block[1] if block else answer).strip()


def python_tokens(code: str) -> list[str]:
    """Tokens of CoNaLa's evaluation: words, split at camelCase, and single symbols."""
    code = re.sub(r"([^A-Za-z0-9_])", r" \1 ", code)
    code = re.sub(r"([a-z])([A-Z])", r"\1 \2", code)
    return code.replace('"', "`").replace("'", "`").split()


def conala(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """BLEU counts and exact match of one answer, with CoNaLa's tokenisation."""
    reference, written = python_tokens(row["snippet"]), python_tokens(written_code(results[0]))
    return _scores(reference, written)


def concode(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """BLEU counts and exact match of one answer; ConCode's references are split at white space."""
    return _scores(row["code"].split(), written_code(results[0]).split())


def _scores(reference: Sequence[str], written: Sequence[str]) -> dict[str, Any]:
    return {
        "bleu": bleu_counts(reference, written),
        "exact_match": float(list(reference) == list(written)),
    }
