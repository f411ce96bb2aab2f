"""Named adapter tensors and their arithmetic. NumPy only; tensors are paired by name."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.errors import FederationError, NotFiniteError

Array = NDArray[Any]
Params = dict[str, Array]
"""Adapter tensors by PEFT state-dict name, float32 unless said otherwise."""

Groups = Mapping[str, Params]
"""Groups of such tensors by name: ``params``, ``delta``, ``control``."""


@dataclass(frozen=True)
class Kept:
    """Tensors of one kind of client memory, and a text that describes them."""

    tensors: Params
    about: str = ""


LARGEST_VALUE = 2.0**14  # of an update or a control variate; LoRA weights never change that much
LARGEST_WEIGHT = 2.0**32  # total number of examples of the clients of a round


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from the run seed and its purpose, e.g. ``(seed, "sampling", round)``."""
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


def moved(params: Mapping[str, Array], change: Mapping[str, Array], scale: float = 1.0) -> Params:
    """`params` plus ``scale * change``, for the tensors in `change`."""
    return {**params, **add({name: params[name] for name in change}, change, scale)}


class Moved(Mapping[str, Array]):
    """`moved` without a scale, computed tensor by tensor on access."""

    def __init__(self, params: Mapping[str, Array], change: Mapping[str, Array]) -> None:
        self._params, self._change = params, change

    def __getitem__(self, name: str) -> Array:
        """The tensor of `params`, plus its change if there is one."""
        value = self._params[name]
        if name not in self._change:
            return value
        return (value + self._change[name]).astype(value.dtype, copy=False)

    def __iter__(self) -> Iterator[str]:
        """The names of `params`."""
        return iter(self._params)

    def __len__(self) -> int:
        """The number of tensors of `params`."""
        return len(self._params)


def digest(params: Mapping[str, Array]) -> str:
    """SHA-256 of names, shapes and values; tensors in float32."""
    found = hashlib.sha256()
    for name, value in sorted(params.items()):
        found.update(f"{name} {value.shape}".encode())
        found.update(np.ascontiguousarray(value, np.float32).tobytes())
    return found.hexdigest()


def num_values(params: Mapping[str, Array]) -> int:
    """Total number of scalars."""
    return sum(int(value.size) for value in params.values())


def check_like(params: Mapping[str, Array], reference: Mapping[str, Array]) -> None:
    """Reject tensors whose names or shapes differ from `reference`, or with values out of range.

    Raises:
        FederationError: names the first offending tensor and the problem.
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
