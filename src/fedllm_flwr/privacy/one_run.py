"""A lower bound on epsilon from one run, by guessing which canaries were inserted.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run", corollary 5.4,
computed as in their appendix D. Each of m records is a member independently with probability one
half. Under (epsilon, delta)-differential privacy, r guesses, v of them correct, have the p-value

    P[B >= v] + 2 m delta max_i P[v > B >= v - i] / i,    B ~ Binomial(r, 1 / (1 + e^-epsilon)).
"""

import numpy as np
from numpy.typing import NDArray

_ABSTAINING = (1, 2, 4, 8)  # guess on the fraction 1/k of the canaries with the most extreme scores
_LARGEST = 50.0  # epsilon


def p_value(num: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bound on the probability of `right` or more correct guesses under (epsilon, delta)-DP.

    Args:
        num: m, the number of canaries, inserted or not.
        guesses: r, the number of canaries guessed on.
    """
    from scipy.stats import binom

    accuracy = 1 / (1 + np.exp(-epsilon))
    beta = float(binom.sf(right - 1, guesses, accuracy))
    below = binom.pmf(np.arange(right - 1, -1, -1), guesses, accuracy)  # of v - 1, v - 2, ...
    alpha = float((below.cumsum() / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, beta + 2 * num * delta * alpha)


def lower_bound(num: int, guesses: int, right: int, delta: float, error: float) -> float:
    """The largest epsilon rejected by this many correct guesses, at significance level `error`."""
    from scipy.optimize import brentq

    def excess(epsilon: float) -> float:
        return p_value(num, guesses, right, epsilon, delta) - error

    if excess(0.0) >= 0:
        return 0.0
    return float(brentq(excess, 0.0, _LARGEST)) if excess(_LARGEST) > 0 else _LARGEST


def guessed_bound(
    scores: NDArray[np.float64], members: NDArray[np.bool_], delta: float, error: float = 0.05
) -> tuple[float, int, int]:
    """The lower bound from one score per canary; members should have higher scores.

    The highest scores are guessed to be members, and as many of the lowest to be non-members. Four
    numbers of guesses are tried, each at a quarter of `error` (Bonferroni).

    Returns:
        Epsilon, the number of guesses behind it, and how many of them are correct.
    """
    order = np.argsort(scores, kind="stable")
    found = []
    for part in _ABSTAINING:
        half = len(order) // (2 * part)
        right = int(members[order[len(order) - half :]].sum() + (~members[order[:half]]).sum())
        bound = lower_bound(len(order), 2 * half, right, delta, error / len(_ABSTAINING))
        found.append((bound, 2 * half, right))
    return max(found, key=lambda each: each[0])
