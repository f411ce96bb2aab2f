"""BLEU against two other implementations, and the tasks that use it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.evaluation.suites.bleu import bleu, bleu_counts
from fedllm_flwr.evaluation.suites.statistics import estimate
from fedllm_flwr.evaluation.suites.tasks.code import conala, concode, python_tokens, written_code

sacrebleu = pytest.importorskip("sacrebleu")  # comes with the harness
texts = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8))
def test_equals_sacrebleu(pairs: list[tuple[list[str], list[str]]]) -> None:
    counts = [bleu_counts(reference, written) for reference, written in pairs]
    references = [" ".join(reference) for reference, _ in pairs]
    written = [" ".join(text) for _, text in pairs]
    other = sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True)
    expected = other.corpus_score(written, [references]).score / 100

    assert estimate("bleu", counts, "test").value == pytest.approx(expected, abs=1e-9)


def test_smoothed_by_hand() -> None:
    """'a b c' for 'a b d e': precisions 3/4, 2/3, 1/2, 1/1 with one added; 3 words for 4."""
    counts = bleu_counts(["a", "b", "d", "e"], ["a", "b", "c"])
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 1) ** 0.25 * np.exp(1 - 4 / 3)

    assert counts == [2, 1, 0, 0, 3, 2, 1, 0, 3, 4]
    assert bleu(np.array([counts], float), smooth=True)[0] == pytest.approx(expected)


def test_nothing_written() -> None:
    counts = np.array([bleu_counts(["a"], [])], float)

    assert bleu(counts, smooth=False)[0] == bleu(counts, smooth=True)[0] == 0.0


def test_conala() -> None:
    row = {"snippet": "print('x', sortedList)"}
    assert python_tokens(row["snippet"]) == [
        "print",
        "(",
        "`",
        "x",
        "`",
        ",",
        "sorted",
        "List",
        ")",
    ]

    same = conala(row, ['```python\nprint( "x",sortedList )\n```'])
    other = conala(row, ["print(x)"])

    assert same["exact_match"] == 1.0
    assert other["exact_match"] == 0.0
    assert other["bleu"][:4] == [4, 1, 0, 0]


def test_concode() -> None:
    row = {"code": "int f ( ) { return 1 ; }"}

    assert concode(row, [" int f ( ) { return 1 ; }\n"])["exact_match"] == 1.0
    assert concode(row, ["int f(){ return 1; }"])["exact_match"] == 0.0


def test_code_without_a_block_is_the_answer() -> None:
    assert written_code(" x = 1 ") == "x = 1"
    assert written_code("Well:\n```java\nint x;\n```\nand more") == "int x;"
