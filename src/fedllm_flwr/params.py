"""Named adapter tensors and their arithmetic. NumPy only; tensors are paired by name."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.errors import FederationError

Array = NDArray[Any]
Params = dict[str, Array]
"""Adapter tensors by PEFT state-dict name, float32 unless said otherwise."""


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from the run seed and what it is for, e.g. ``(seed, "sampling", round)``."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def zeros_like(params: Mapping[str, Array]) -> Params:
    """Zeros with the names, shapes and dtypes of `params`."""
    return {name: np.zeros_like(value) for name, value in params.items()}


def add(left: Mapping[str, Array], right: Mapping[str, Array]) -> Params:
    """``left + right`` by name, in the dtype of `left`."""
    return {name: (left[name] + right[name]).astype(left[name].dtype) for name in left}


def subtract(left: Mapping[str, Array], right: Mapping[str, Array]) -> Params:
    """``left - right`` by name, in the dtype of `left`."""
    return {name: (left[name] - right[name]).astype(left[name].dtype) for name in left}


def num_values(params: Mapping[str, Array]) -> int:
    """Total number of scalars."""
    return sum(int(value.size) for value in params.values())


def check_like(params: Mapping[str, Array], reference: Mapping[str, Array]) -> None:
    """Refuse tensors that do not match `reference` in names and shapes, or are not finite.

    Raises:
        FederationError: names the first offending tensor and what is wrong with it.
    """
    if missing := sorted(set(reference) - set(params)):
        raise FederationError(f"{missing[0]!r} is missing ({len(missing)} of {len(reference)})")
    if foreign := sorted(set(params) - set(reference)):
        raise FederationError(f"{foreign[0]!r} is not a tensor of this adapter")
    for name, value in sorted(params.items()):
        if value.shape != reference[name].shape:
            raise FederationError(
                f"{name!r} has shape {value.shape}, expected {reference[name].shape}"
            )
        if not np.issubdtype(value.dtype, np.floating):
            raise FederationError(f"{name!r} has dtype {value.dtype}, expected a float type")
        if not np.isfinite(value).all():
            kind = "NaN" if np.isnan(value).any() else "Inf"
            raise FederationError(f"{name!r} holds {kind}")


class RunningMean:
    """Weighted mean of tensors added one at a time, in memory that holds one sum.

    Sums are kept as unevaluated pairs of float64 (error-free TwoSum, Knuth 1969), about 106 bits,
    so that the rounded result does not depend on the order in which the terms arrive.
    """

    def __init__(self) -> None:
        self.weight: float = 0.0
        self.count: int = 0
        self._high: dict[str, Array] = {}
        self._low: dict[str, Array] = {}

    def add(self, params: Mapping[str, Array], weight: float) -> None:
        """Add ``weight * params``; weights are counts of examples or 1."""
        if not weight > 0:
            raise ValueError(f"weight must be > 0, got {weight}")
        for name, value in params.items():
            term = value.astype(np.float64) * weight
            if name not in self._high:
                self._high[name], self._low[name] = term, np.zeros_like(term)
                continue
            high = self._high[name]
            total = high + term
            virtual = total - high
            self._low[name] += (high - (total - virtual)) + (term - virtual)
            self._high[name] = total
        self.weight += weight
        self.count += 1

    def mean(self) -> Params:
        """The weighted mean in float64."""
        return self._divided_by(self.weight)

    def sum_over(self, denominator: float) -> Params:
        """The weighted sum divided by `denominator` instead of the total weight, in float64."""
        return self._divided_by(denominator)

    def _divided_by(self, denominator: float) -> Params:
        return {name: (self._high[name] + self._low[name]) / denominator for name in self._high}


def global_norm(params: Mapping[str, Array]) -> float:
    """Euclidean norm over all tensors."""
    squares: Iterable[float] = (
        float(np.square(params[name].astype(np.float64)).sum()) for name in sorted(params)
    )
    return float(np.sqrt(sum(squares)))
