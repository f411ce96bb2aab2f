"""Scores against scikit-learn, intervals against a loop, differences by hand."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from fedllm_flwr.evaluation.suites.catalogue import Average, SuiteMetric, SuiteTask
from fedllm_flwr.evaluation.suites.scores import average_estimate, task_estimates
from fedllm_flwr.evaluation.suites.statistics import (
    RESAMPLES,
    Estimate,
    IntervalEstimate,
    clear_together,
    estimate,
    mean_of,
    over_seeds,
)

LABELS = ["negative", "neutral", "positive"]


def random_pairs(count: int, unparsable: float, seed: int = 0) -> list[list[str | None]]:
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        target = str(rng.choice(LABELS, p=[0.2, 0.5, 0.3]))
        guess = target if rng.random() < 0.5 else str(rng.choice(LABELS))
        pairs.append([target, None if rng.random() < unparsable else guess])
    return pairs


@pytest.mark.parametrize("unparsable", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["accuracy", "macro_f1", "micro_f1", "weighted_f1"])
def test_scores_equal_those_of_scikit_learn(kind: str, unparsable: float) -> None:
    pairs = random_pairs(400, unparsable)
    targets = [target for target, _ in pairs]
    guesses = [guess or "none of them" for _, guess in pairs]
    if kind == "accuracy":
        expected = accuracy_score(targets, guesses)
    else:
        average = kind.removesuffix("_f1")
        expected = f1_score(targets, guesses, labels=LABELS, average=average, zero_division=0)

    assert estimate(kind, pairs, "x").value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["accuracy", "macro_f1", "weighted_f1"])
def test_resamples_are_scores_of_drawn_examples(kind: str) -> None:
    """Their mean and spread are those of a loop that draws examples and scores them anew."""
    pairs = random_pairs(120, 0.1)
    rng = np.random.default_rng(5)
    drawn = [
        estimate_value(kind, [pairs[i] for i in rng.integers(0, len(pairs), len(pairs))])
        for _ in range(400)
    ]
    found = estimate(kind, pairs, "x")

    assert len(found.resamples) == RESAMPLES
    assert found.resamples.mean() == pytest.approx(np.mean(drawn), abs=0.01)
    assert found.resamples.std() == pytest.approx(np.std(drawn), rel=0.15)
    low, high = found.interval
    assert low < found.value < high


def estimate_value(kind: str, pairs: list[list[str | None]]) -> float:
    targets = [target for target, _ in pairs]
    guesses = [guess or "none of them" for _, guess in pairs]
    if kind == "accuracy":
        return float(accuracy_score(targets, guesses))
    average = kind.removesuffix("_f1")
    return float(f1_score(targets, guesses, labels=LABELS, average=average, zero_division=0))


def test_a_target_of_no_class_is_a_false_positive_or_nothing() -> None:
    """Two questions, whose class is "yes to it": F1 of a, 1 right 1 wrong 1 missed; of b, none."""
    pairs = [["a", "a"], ["a", None], [None, "a"], [None, None], ["b", None], [None, None]]
    f1_of_a, f1_of_b = 2 * 1 / (2 * 1 + 1 + 1), 0.0

    assert estimate("macro_f1", pairs, "x").value == pytest.approx((f1_of_a + f1_of_b) / 2)
    assert estimate("weighted_f1", pairs, "x").value == pytest.approx((2 * f1_of_a + f1_of_b) / 3)
    assert estimate("micro_f1", pairs, "x").value == pytest.approx(2 * 1 / (2 * 1 + 1 + 2))
    assert estimate("weighted_f1", [[None, None]], "x").interval == (0, 0)


SET_COUNTS = [[2, 1, 0], [0, 3, 1], [1, 0, 4]]  # right, wrong, missed: 3, 4 and 5 in all


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("set_precision", 3 / 7), ("set_recall", 3 / 8), ("set_f1", 2 * 3 / (2 * 3 + 4 + 5))],
)
def test_scores_of_sets_are_those_of_summed_counts(kind: str, expected: float) -> None:
    assert estimate(kind, SET_COUNTS, "x").value == pytest.approx(expected)
    assert estimate(kind, [[0, 0, 0]], "x").value == 0


def test_resampled_f1_of_sets() -> None:
    """Mean and spread over the resamples are those of all 27 equally likely draws of three."""
    drawn = [np.sum(some, axis=0) for some in itertools.product(SET_COUNTS, repeat=3)]
    expected = [2 * tp / (2 * tp + fp + fn) for tp, fp, fn in drawn]
    found = estimate("set_f1", SET_COUNTS, "x").resamples

    assert found.mean() == pytest.approx(np.mean(expected), abs=0.02)
    assert found.std() == pytest.approx(np.std(expected), rel=0.1)


def test_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).random(5000) < 0.3
    low, high = estimate("mean", values.tolist(), "x").interval

    half = 1.96 * np.sqrt(0.3 * 0.7 / 5000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_difference_of_two_models_is_paired() -> None:
    """One is right wherever the other is, and on ten examples more: 0.1 for certain."""
    worse = [1.0] * 50 + [0.0] * 50
    better = [1.0] * 60 + [0.0] * 40
    difference = estimate("mean", better, "x").minus(estimate("mean", worse, "x"))

    assert difference.value == pytest.approx(0.1)
    low, _ = difference.interval
    assert low == pytest.approx(0.1 - 1.96 * np.sqrt(0.1 * 0.9 / 100), abs=0.02)
    assert low > 0
    unpaired = estimate("mean", better, "x").minus(estimate("mean", worse, "another"))
    assert unpaired.interval[0] < low  # other resamples: the examples' own spread stays in


def test_equal_predictions_differ_by_nothing() -> None:
    pairs = random_pairs(80, 0.1)
    difference = estimate("macro_f1", pairs, "x").minus(estimate("macro_f1", pairs, "x"))

    assert difference.value == 0
    assert difference.interval == (0, 0)


def test_mean_over_tasks() -> None:
    one, other = estimate("mean", [1, 1, 0, 0], "a"), estimate("mean", [1, 0, 0, 0], "b")
    both = mean_of([one, other])

    assert both.value == pytest.approx(0.375)
    np.testing.assert_allclose(both.resamples, (one.resamples + other.resamples) / 2)


def simulated_comparisons(
    num_seeds: int,
    spread: float,
    per_example: float,
    difference: float = 0.0,
    count: int = 1000,
    num_examples: int = 400,
) -> list[list[Estimate]]:
    """`count` comparisons of two algorithms: their paired differences of accuracy by seed.

    Args:
        spread: standard deviation of a run's accuracy over seeds.
        per_example: of the difference, over examples, between the two algorithms' chances to be
            right: what all seeds share.
        difference: between the algorithms in truth.
    """
    rng = np.random.default_rng([num_seeds, round(1000 * spread), round(1000 * per_example)])
    shape = (num_examples, count, num_seeds)
    own = per_example / np.sqrt(2)
    right = []
    for level in (0.6 + difference, 0.6):
        chance = level + rng.normal(0, own, (*shape[:2], 1)) + rng.normal(0, spread, shape[1:])
        right.append((rng.random(shape) < chance).astype(np.float32))
    each = (right[0] - right[1]).reshape(num_examples, -1)
    draws = rng.multinomial(num_examples, np.full(num_examples, 1 / num_examples), 300)
    resampled = (draws.astype(np.float32) / num_examples) @ each
    found = [
        Estimate(float(value), resamples, num_examples)
        for value, resamples in zip(each.mean(0), resampled.T.astype(np.float64), strict=True)
    ]
    return [found[i : i + num_seeds] for i in range(0, len(found), num_seeds)]


def is_clear(score: IntervalEstimate) -> bool:
    """Whether the interval leaves out zero, which is what its p-value says as well."""
    low, high = score.interval
    assert (low > 0 or high < 0) == (score.p_value < 0.05)
    return clear_together([score.p_value]) == [True]


@pytest.mark.parametrize(
    ("num_seeds", "spread", "per_example"),
    [(3, 0.04, 0.0), (3, 0.04, 0.3), (3, 0.0, 0.3), (2, 0.04, 0.3), (5, 0.04, 0.0)],
)
def test_one_comparison_in_twenty_is_clear_where_nothing_differs(
    num_seeds: int, spread: float, per_example: float
) -> None:
    comparisons = simulated_comparisons(num_seeds, spread, per_example)

    clear = np.mean([is_clear(over_seeds(by_seed)) for by_seed in comparisons])
    # 1000 comparisons: the standard error of a share of 5 % is 0.7 %.
    assert clear <= 0.05 + 2 * 0.007
    low, high = np.array([mean_of(by_seed).interval for by_seed in comparisons]).T
    by_examples = np.mean((low > 0) | (high < 0))  # as if no other seed could have come
    assert by_examples > 0.2 if spread else by_examples < 0.1


def test_a_difference_far_above_the_spread_is_clear() -> None:
    comparisons = simulated_comparisons(3, 0.04, 0.0, difference=0.3, count=200)
    assert np.mean([is_clear(over_seeds(by_seed)) for by_seed in comparisons]) > 0.9
    intervals = np.array([over_seeds(by_seed).interval for by_seed in comparisons])
    covered = (intervals[:, 0] < 0.3) & (intervals[:, 1] > 0.3)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.035)


def test_one_seed_says_that_its_interval_is_over_examples() -> None:
    one = estimate("mean", [1.0] * 60 + [0.0] * 40, "x")
    score = over_seeds([one])
    assert (score.interval, score.over, score.num_seeds) == (one.interval, "examples", 1)
    several = over_seeds([one, one, one])
    assert (several.over, several.num_examples) == ("seeds and examples", 100)
    # Equal seeds: what is uncertain is the examples alone, by the normal distribution.
    half = 1.96 * np.sqrt(0.6 * 0.4 / 100)
    assert several.interval == pytest.approx((0.6 - half, 0.6 + half), abs=0.005)


def test_seeds_without_noise_of_examples_give_student_s_interval() -> None:
    values = [0.30, 0.31, 0.35]
    score = over_seeds([Estimate(value, np.full(1000, value), 50) for value in values])
    half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)  # t of two degrees of freedom
    assert score.interval == pytest.approx((0.32 - half, 0.32 + half), abs=1e-6)


@pytest.mark.parametrize(
    ("p_values", "clear"),
    [
        ([0.04], [True]),
        ([0.04, 0.02], [True, True]),  # 0.02 <= 0.05 / 2, then 0.04 <= 0.05 / 1
        ([0.04, 0.03], [False, False]),
        ([0.01, 0.9, 0.02, 0.03], [True, False, False, False]),
        ([], []),
    ],
)
def test_several_comparisons_are_corrected_by_holm(
    p_values: list[float], clear: list[bool]
) -> None:
    assert clear_together(p_values) == clear


def test_a_table_of_comparisons_rarely_has_a_false_star() -> None:
    """Tables of eight comparisons where nothing differs: one in twenty has a star, at most."""
    p_values = [over_seeds(by_seed).p_value for by_seed in simulated_comparisons(3, 0.04, 0.3)]
    tables = [p_values[i : i + 8] for i in range(0, len(p_values), 8)]
    false = np.mean([any(clear_together(table)) for table in tables])
    assert false <= 0.06 + 2 * 0.02  # 125 tables: the standard error of 5 % is 2 %
    alone = np.mean([any(p < 0.05 for p in table) for table in tables])
    assert alone > 0.15


def make_task(*metrics: SuiteMetric) -> SuiteTask:
    return SuiteTask("t", "s", "", "", "", "", "", metrics)


def test_metrics_of_parts_and_averages() -> None:
    samples = [
        {"id": f"{part}/{i}", "part": part, "acc": float(i < right)}
        for part, right in (("one", 3), ("other", 1))
        for i in range(4)
    ]
    task = make_task(
        SuiteMetric("all", column="acc"), SuiteMetric("one", column="acc", parts=("one",))
    )
    found = task_estimates(task, samples)

    assert {name: item.value for name, item in found.items()} == {"all": 0.5, "one": 0.75}
    assert average_estimate(Average("a", ("t", "u"), "all"), {"t": found}) is None
    mean = average_estimate(Average("a", ("t",), "one"), {"t": found})
    assert mean is not None
    assert mean.value == 0.75
