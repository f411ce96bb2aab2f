"""Corpus BLEU, from counts that are summed over the examples (Papineni et al. 2002)."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ORDER = 4
Floats = NDArray[np.float64]


def bleu_counts(reference: Sequence[str], written: Sequence[str]) -> list[int]:
    """Clipped matches and totals of n-grams for n = 1..4, and both lengths: 10 numbers."""
    matching, possible = [], []
    for n in range(1, ORDER + 1):
        found, wanted = _ngrams(written, n), _ngrams(reference, n)
        matching.append((found & wanted).total())
        possible.append(found.total())
    return [*matching, *possible, len(written), len(reference)]


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def bleu(sums: Floats, smooth: bool) -> Floats:
    """BLEU-4 (0 to 1) of summed counts, (sets, 10) -> (sets,).

    Args:
        smooth: add one to every n-gram count (Lin and Och 2004), as CodeXGLUE does.
    """
    matching, possible = sums[:, :ORDER] + smooth, sums[:, ORDER : 2 * ORDER] + smooth
    written, reference = sums[:, -2], sums[:, -1]
    precision = np.divide(matching, possible, out=np.zeros_like(matching), where=possible > 0)
    with np.errstate(divide="ignore"):
        mean = np.exp(np.log(precision).mean(1))  # zero if one precision is zero
        brevity = np.exp(np.minimum(0.0, 1.0 - reference / written))
    return np.asarray(np.where(written > 0, mean * brevity, 0.0))
