"""Named adapter tensors and their arithmetic. NumPy only; tensors are paired by name."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.errors import FederationError, NotFiniteError

Array = NDArray[Any]
Params = dict[str, Array]
"""Adapter tensors by PEFT state-dict name, float32 unless said otherwise."""

LARGEST_VALUE = 2.0**14  # of an update or a control variate; LoRA weights do not move that far
LARGEST_WEIGHT = 2.0**32  # examples of all clients of a round together
_COARSE, _FINE = 2.0**-16, 2.0**-63  # units of `RunningMean`


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from the run seed and what it is for, e.g. ``(seed, "sampling", round)``."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def full_like(params: Mapping[str, Array], value: float) -> Params:
    """float64 tensors with the names and shapes of `params`, filled with `value`."""
    return {name: np.full(array.shape, value, np.float64) for name, array in params.items()}


def add(left: Mapping[str, Array], right: Mapping[str, Array], scale: float = 1.0) -> Params:
    """``left + scale * right`` by name, in the dtype of `left`."""
    return {name: (left[name] + scale * right[name]).astype(left[name].dtype) for name in left}


def subtract(left: Mapping[str, Array], right: Mapping[str, Array]) -> Params:
    """``left - right`` by name, in the dtype of `left`."""
    return {name: (left[name] - right[name]).astype(left[name].dtype) for name in left}


def num_values(params: Mapping[str, Array]) -> int:
    """Total number of scalars."""
    return sum(int(value.size) for value in params.values())


def check_like(params: Mapping[str, Array], reference: Mapping[str, Array]) -> None:
    """Refuse tensors that do not match `reference` in names and shapes, or hold absurd values.

    Raises:
        FederationError: names the first offending tensor and what is wrong with it.
    """
    if missing := sorted(set(reference) - set(params)):
        raise FederationError(f"{missing[0]!r} is missing ({len(missing)} of {len(reference)})")
    if foreign := sorted(set(params) - set(reference)):
        raise FederationError(f"{foreign[0][:100]!r} is not a tensor of this adapter")
    for name, value in sorted(params.items()):
        if value.shape != reference[name].shape:
            raise FederationError(
                f"{name!r} has shape {value.shape}, expected {reference[name].shape}"
            )
        if not np.issubdtype(value.dtype, np.floating):
            raise FederationError(f"{name!r} has dtype {value.dtype}, expected a float type")
        _check_values(name, value)


def _check_values(name: str, value: Array) -> None:
    largest = float(np.abs(value).max(initial=0.0))  # NaN if any value is
    if np.isnan(largest):
        raise NotFiniteError(f"{name!r} holds NaN")
    if np.isinf(largest):
        raise NotFiniteError(f"{name!r} holds Inf")
    if largest > LARGEST_VALUE:
        raise NotFiniteError(
            f"{name!r} holds {largest:.3g}, more than {LARGEST_VALUE:.0f}: local training diverged"
        )


class RunningMean:
    """Weighted mean of tensors added one at a time; its bits do not depend on their order.

    Floating-point sums depend on the order of their terms, integer sums do not. Each term
    ``weight * value`` is rounded, by itself, to a multiple of 2^-63 and added to a pair of int64
    sums: one in units of 2^-16, one for the rest in units of 2^-63. Both are exact for values up
    to `LARGEST_VALUE`, a total weight up to `LARGEST_WEIGHT` and 2^16 terms, so the only error is
    the first rounding, below 1e-19 for a term. Memory: one sum of 16 bytes a value.
    """

    def __init__(self) -> None:
        self.weight: float = 0.0
        self.count: int = 0
        self._coarse: dict[str, Array] = {}
        self._fine: dict[str, Array] = {}

    def add(self, params: Mapping[str, Array], weight: float) -> None:
        """Add ``weight * params``; values as `check_like` admits, weights are counts or 1."""
        if not (weight > 0 and self.weight + weight <= LARGEST_WEIGHT and self.count < 2**16):
            raise ValueError(f"cannot add weight {weight} to {self.count} terms of {self.weight}")
        for name, value in params.items():
            if name not in self._coarse:
                self._coarse[name] = np.zeros(value.shape, np.int64)
                self._fine[name] = np.zeros(value.shape, np.int64)
            rest = np.multiply(value, weight, dtype=np.float64)
            coarse = np.rint(rest * (1 / _COARSE))
            self._coarse[name] += coarse.astype(np.int64)
            rest -= coarse * _COARSE  # exact: both are multiples of the last bit of the term
            rest *= 1 / _FINE
            self._fine[name] += np.rint(rest, out=rest).astype(np.int64)
        self.weight += weight
        self.count += 1

    def mean(self) -> Params:
        """The weighted mean in float64."""
        return self.sum_over(self.weight)

    def sum_over(self, denominator: float) -> Params:
        """The weighted sum divided by `denominator` instead of the total weight, in float64."""
        return {
            name: (self._coarse[name] * _COARSE + self._fine[name] * _FINE) / denominator
            for name in self._coarse
        }
