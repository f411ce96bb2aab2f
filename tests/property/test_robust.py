"""Robust combiners: each against its paper's formula as a loop, and what attackers can do to it."""

import itertools
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as limited
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedllm_flwr.config.schema import RobustConfig
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation import robust
from fedllm_flwr.federation.robust import (
    CENTRE,
    CentredClip,
    GeometricMedian,
    Krum,
    Median,
    NormBound,
    Robust,
    TrimmedMean,
)
from fedllm_flwr.params import Params

Points = NDArray[np.float64]  # (clients, values)
SHAPES = {"lora_A": (2, 7), "lora_B": (5, 2)}
SIZE = 24
ATTACKERS = 0.3


def as_params(point: NDArray[np.float64]) -> Params:
    parts = np.split(point, [14])
    return {
        name: part.reshape(SHAPES[name])
        for name, part in zip(("lora_A", "lora_B"), parts, strict=True)
    }


def flat(params: Params) -> Points:
    return np.concatenate([params[name].ravel() for name in sorted(params)])


def combine(combiner: Robust, points: Points, order: list[int] | None = None) -> Points:
    for i in order or range(len(points)):
        combiner.add(f"client-{i:02}", as_params(points[i].astype(np.float32)), 1.0 + i)
    return flat(combiner.combined())


def naive_trimmed_mean(points: Points, trimmed: int) -> Points:
    result = []
    for column in points.T:
        ordered = sorted(column)[trimmed : len(column) - trimmed]
        result.append(sum(ordered) / len(ordered))
    return np.array(result)


def naive_krum(points: Points, average: int | None = None) -> Points:
    count, attackers = len(points), int(ATTACKERS * len(points))
    scores = []
    for i in range(count):
        others = sorted(np.sum((points[i] - points[j]) ** 2) for j in range(count) if j != i)
        scores.append(sum(others[: count - attackers - 2]))
    chosen = sorted(range(count), key=scores.__getitem__)[: average or count - attackers]
    return sum(points[i] for i in chosen) / len(chosen)


def naive_geometric_median(points: Points) -> Points:
    v = points.mean(axis=0)
    for _ in range(100):
        weights = [1 / max(1e-6, float(np.linalg.norm(x - v))) for x in points]
        v = sum(w * x for w, x in zip(weights, points, strict=True)) / sum(weights)
    return v


def clipped(z: Points, tau: float) -> Points:
    return z * min(1.0, tau / float(np.linalg.norm(z)))


def naive_norm_bound(points: Points, tau: float | None = None) -> Points:
    tau = tau or float(np.median([np.linalg.norm(x) for x in points]))
    return sum(clipped(x, tau) for x in points) / len(points)


def naive_centred_clip(points: Points, centre: Points, tau: float, steps: int) -> Points:
    v = centre
    for _ in range(steps):
        v = v + sum(clipped(x - v, tau) for x in points) / len(points)
    return v


CENTRE_POINT = np.random.default_rng(5).normal(size=SIZE)
RULES: dict[str, tuple[Callable[[], Robust], Callable[[Points], Points]]] = {
    "median": (Median, lambda points: np.median(points, axis=0)),
    "trimmed_mean": (TrimmedMean, lambda x: naive_trimmed_mean(x, int(ATTACKERS * len(x)))),
    "krum": (lambda: Krum(RobustConfig(average=1)), partial(naive_krum, average=1)),
    "multi_krum": (Krum, naive_krum),
    "geometric_median": (GeometricMedian, naive_geometric_median),
    "norm_bound": (NormBound, naive_norm_bound),
    "norm_bound_of_1": (
        lambda: NormBound(RobustConfig(radius=1.0)),
        partial(naive_norm_bound, tau=1.0),
    ),
    "centred_clip": (
        lambda: CentredClip(RobustConfig(radius=2.0, steps=3), as_params(CENTRE_POINT)),
        lambda x: naive_centred_clip(x, CENTRE_POINT, 2.0, 3),
    ),
}


@pytest.mark.parametrize("name", RULES)
@given(seed=st.integers(0, 2**32), count=st.integers(9, 13), block=st.sampled_from([13, 10**6]))
@limited(max_examples=15, deadline=None)
def test_each_rule_is_its_formula_in_any_order(
    name: str, seed: int, count: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(count, SIZE)).astype(np.float32).astype(np.float64)
    make, naive = RULES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robust, "_BLOCK", block)
        found = combine(make(), points)
        other = combine(make(), points, list(rng.permutation(count)))
    np.testing.assert_allclose(found, naive(points), rtol=1e-9, atol=1e-11)
    assert found.tobytes() == other.tobytes()


def with_attackers(seed: int, honest: int, attackers: int, far: float) -> tuple[Points, Points]:
    """Honest updates around one point, and all with the attackers' at any place and distance."""
    rng = np.random.default_rng(seed)
    good = rng.normal(size=SIZE) + rng.normal(size=(honest, SIZE))
    bad = far * rng.normal(size=SIZE) + rng.normal(size=(attackers, SIZE))
    both = np.concatenate([good, bad]).astype(np.float32).astype(np.float64)
    return both[:honest], both


LYING = {"seed": st.integers(0, 2**32), "far": st.sampled_from([0.0, 3.0, 1e3, 1e4, -1e4])}


@given(**LYING)
@limited(max_examples=40, deadline=None)
def test_a_third_of_attackers_cannot_carry_a_robust_rule_away(seed: int, far: float) -> None:
    """Each bound is the rule's own; the plain mean has none."""
    good, points = with_attackers(seed, honest=7, attackers=3, far=far)
    low, high = good.min(axis=0), good.max(axis=0)
    for combiner in (Median(), TrimmedMean()):
        found = combine(combiner, points)
        assert (found >= low - 1e-9).all()
        assert (found <= high + 1e-9).all()
    centre, spread = good.mean(axis=0), np.linalg.norm(good - good.mean(axis=0), axis=1).max()
    chosen = combine(Krum(RobustConfig(average=1)), points)
    assert np.linalg.norm(chosen - centre) <= 3 * spread + 1e-6
    # Lopuhaa and Rousseeuw 1991: 2 (n - f) / (n - 2 f) times the largest honest distance, and what
    # a few steps from the mean still miss.
    found = combine(GeometricMedian(RobustConfig(steps=100)), points)
    assert np.linalg.norm(found - centre) <= 2 * 7 / 4 * spread + 1e-3 * abs(far)
    assert np.linalg.norm(combine(NormBound(RobustConfig(radius=0.5)), points)) <= 0.5 + 1e-9


@given(**LYING)
@limited(max_examples=20, deadline=None)
def test_an_attacker_moves_centred_clipping_by_a_share_of_the_radius(seed: int, far: float) -> None:
    """In one step a change of one update moves the result by 2 tau / n at most."""
    _, points = with_attackers(seed, honest=7, attackers=3, far=far)
    other = points.copy()
    other[-1] = -points[-1] - 1.0
    one, two = (
        combine(CentredClip(RobustConfig(radius=1.5, steps=1)), values)
        for values in (points, other)
    )
    assert np.linalg.norm(one - two) <= 2 * 1.5 / 10 + 1e-6


def test_one_attacker_carries_the_mean_away_and_five_of_ten_the_median() -> None:
    """So that the bounds above say something."""
    good, points = with_attackers(1, honest=5, attackers=5, far=1e4)
    found = combine(Median(), points)
    assert np.abs(found - good.mean(axis=0)).max() > 100


@pytest.mark.parametrize(
    "kind", [TrimmedMean, Median, Krum, GeometricMedian, NormBound, CentredClip]
)
def test_attackers_far_away_are_cut_and_named(kind: type[Robust]) -> None:
    _, points = with_attackers(3, honest=7, attackers=3, far=100.0)
    combiner = kind()
    combine(combiner, points)
    cut = [combiner.cut[f"client-{i:02}"] for i in range(10)]
    assert max(cut[:7]) < 0.5 < min(cut[7:])


def test_the_centre_is_what_the_last_round_gave() -> None:
    _, points = with_attackers(4, honest=7, attackers=0, far=0.0)
    first = CentredClip(RobustConfig(radius=1.0, steps=1))
    moved = combine(first, points)
    np.testing.assert_array_equal(flat(first.history[CENTRE]), moved)
    assert Median().history == {}


def test_krum_needs_more_replies_than_attackers() -> None:
    combiner = Krum(RobustConfig(liars=0.4))
    with pytest.raises(FederationError, match=r"2 f \+ 3 = 7 replies where f = 2 of 6 .*0.4"):
        combine(combiner, np.eye(6, SIZE))


def test_memory_is_bounded_by_what_a_rule_says() -> None:
    count, size = 24, 400_000
    for kind, block in itertools.product((Median, GeometricMedian), (2**16, 2**19)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(robust, "_BLOCK", block)
            combiner = kind()
            tracemalloc.start()
            for i in range(count):
                combiner.add(str(i), {"w": np.full(size, i, np.float32)}, 1.0)
            combiner.combined()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak <= kind.memory(count, size) + 2 * 4 * size  # an update, and its bytes
            assert kind.memory(count, size) < 4 * count * size
