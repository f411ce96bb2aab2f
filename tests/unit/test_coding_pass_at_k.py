"""pass@k against its definition, in exact arithmetic."""

from fractions import Fraction
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.evaluation.coding.code_suite import pass_at_k


@settings(deadline=None)
@given(st.data())
def test_equals_the_closed_formula(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 300))
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    exact = 1 - Fraction(comb(n - c, k), comb(n, k))

    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)


def test_is_the_share_of_subsets_with_a_passing_answer() -> None:
    """Of the 10 pairs of 5 samples, 2 of which passed, 7 hold one that passed."""
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)


def test_large_numbers_stay_finite() -> None:
    assert pass_at_k(100_000, 50_000, 1) == pytest.approx(0.5)
    assert pass_at_k(100_000, 0, 100) == 0.0
    assert pass_at_k(100_000, 100_000, 100) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 6), (5, 6, 1), (5, -1, 1), (5, 1, 0), (0, 0, 1)])
def test_undefined(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, c, k)
