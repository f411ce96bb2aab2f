"""Arithmetic on named tensors."""

import numpy as np
import pytest

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.combine import RunningMean
from fedllm_flwr.params import (
    LARGEST_VALUE,
    LARGEST_WEIGHT,
    add,
    check_like,
    derive_seed,
    full_like,
    num_values,
    subtract,
)


def test_tensors_pair_by_name():
    left = {"a": np.array([1.0, 2.0]), "b": np.array([3.0])}
    right = {"b": np.array([10.0]), "a": np.array([1.0, 1.0])}
    assert {k: v.tolist() for k, v in add(left, right, 2.0).items()} == {"a": [3, 4], "b": [23]}
    assert {k: v.tolist() for k, v in subtract(left, right).items()} == {"a": [0, 1], "b": [-7]}


def test_dtype_of_the_left_operand_stays():
    left = {"a": np.ones(2, np.float32)}
    assert add(left, {"a": np.ones(2)}, 0.5)["a"].dtype == np.float32
    assert full_like(left, 0.25)["a"].dtype == np.float64
    assert full_like(left, 0.25)["a"].tolist() == [0.25, 0.25]


def test_number_of_values():
    params = {"a": np.array([[3.0, 0.0]], np.float32), "b": np.array([4.0], np.float32)}
    assert num_values(params) == 3


def test_seeds_differ_by_every_part():
    seeds = {derive_seed(0, "a", 1), derive_seed(1, "a", 1), derive_seed(0, "b", 1)}
    assert len(seeds | {derive_seed(0, "a", 2), derive_seed(0, "a1")}) == 5
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)
    assert all(0 <= seed < 2**63 for seed in seeds)


REFERENCE = {"a": np.zeros((2, 2), np.float32), "b": np.zeros(3, np.float32)}
BAD = {
    "missing": ({"a": np.zeros((2, 2))}, "'b' is missing (1 of 2)"),
    "foreign": ({**REFERENCE, "c": np.zeros(1)}, "'c' is not a tensor of this adapter"),
    "shape": (
        {**REFERENCE, "b": np.zeros((3, 1))},
        "'b' has shape (3, 1), expected (3,)",
    ),
    "dtype": ({**REFERENCE, "b": np.zeros(3, int)}, "'b' has dtype int64, expected a float type"),
    "nan": ({**REFERENCE, "b": np.array([0, np.nan, np.inf])}, "'b' holds NaN"),
    "inf": ({**REFERENCE, "b": np.array([0, -np.inf, 0])}, "'b' holds Inf"),
    "huge": ({**REFERENCE, "b": np.array([0, -2e4, 0])}, "'b' holds 2e+04, more than 16384"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_refused_by_name(case):
    params, message = BAD[case]
    with pytest.raises(FederationError) as error:
        check_like(params, REFERENCE)
    assert message in str(error.value)


def test_good_tensors_pass_in_any_order_and_float_type():
    largest = np.full(3, LARGEST_VALUE, np.float16)
    check_like({"b": largest, "a": np.ones((2, 2), np.float32)}, REFERENCE)


def two_terms():
    mean = RunningMean()
    mean.add({"a": np.array([1.0, -2.0], np.float32)}, 1)
    mean.add({"a": np.array([4.0, 10.0], np.float32)}, 3)
    return mean


def test_weighted_mean_and_sum():
    mean = two_terms()
    assert (mean.count, mean.weight) == (2, 4)
    assert mean.mean()["a"].tolist() == [13 / 4, 28 / 4]
    assert two_terms().sum_over(10)["a"].tolist() == [1.3, 2.8]


def test_sums_can_be_taken_once_only():
    mean = two_terms()
    mean.mean()
    with pytest.raises(ValueError, match="taken"):
        mean.mean()
    with pytest.raises(ValueError, match="cannot add"):
        mean.add({"a": np.zeros(2)}, 1)


@pytest.mark.parametrize("weight", [1.0, 2.0**10, 2.0**30])
def test_largest_terms_do_not_overflow(weight):
    """Nor where the sums outgrow 32 bits between two terms, or within one."""
    mean = RunningMean()
    for sign in (1, 1, -1):
        mean.add({"a": np.array([sign * LARGEST_VALUE, LARGEST_VALUE])}, weight)
    assert mean.mean()["a"].tolist() == [LARGEST_VALUE / 3, LARGEST_VALUE]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), 2 * LARGEST_WEIGHT])
def test_weights_that_make_no_mean_are_refused(weight):
    with pytest.raises(ValueError, match="cannot add weight"):
        RunningMean().add({"a": np.zeros(1)}, weight)
