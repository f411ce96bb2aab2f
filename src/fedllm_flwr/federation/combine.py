"""Combiners: how the accepted contributions of a round become one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np

from fedllm_flwr.config import Config
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import LARGEST_WEIGHT, Array, Groups, Params

_COARSE, _FINE = 2.0**-16, 2.0**-63  # units of `RunningMean`


class Combiner(ABC):
    """Takes one round's accepted updates, one at a time as they arrive, and gives one for all.

    A combiner is made anew for each round. Its result must not depend on the order in which updates
    arrive, so that a simulation and its repetition end with the same bits. It is registered by name
    (`plugins.COMBINERS`) and states what it keeps: ``memory(n, values)``.

    One that needs all updates at once, for a median or a singular value decomposition, may keep
    them in memory, or in files and read back a block of coordinates of each; they come with their
    clients' names, so that it can put them in order.
    """

    robust: ClassVar[bool] = False
    """Whether it is for rounds in which clients may lie, and uses the settings ``robust``."""

    @classmethod
    def of(cls, config: Config, state: ServerState) -> Self:
        """A combiner for one round, from the configuration and the state before the round."""
        return cls()

    @property
    def cut(self) -> Mapping[str, float]:
        """By client, the share of its update that the result leaves out, from 0 to 1."""
        return {}

    @property
    def history(self) -> Groups:
        """Groups of tensors for ``state.tensors``, which the next round's combiner starts from."""
        return {}

    @abstractmethod
    def add(self, client: str, update: Params, weight: float) -> None:
        """Take the update of `client`; it is validated, and is given once."""

    @abstractmethod
    def combined(self) -> Params:
        """One update for all, in float64, with names and shapes of the adapter."""

    @staticmethod
    @abstractmethod
    def memory(num_clients: int, num_values: int) -> int:
        """Bytes kept for `num_clients` updates of `num_values` values each."""


class WeightedMean(Combiner):
    """sum_i p_i D_i with p_i = weight_i / sum_j weight_j."""

    def __init__(self) -> None:
        self._mean = RunningMean()

    def add(self, client: str, update: Params, weight: float) -> None:
        """Add to the sums."""
        self._mean.add(update, weight)

    def combined(self) -> Params:
        """The weighted mean."""
        return self._mean.mean()

    @staticmethod
    def memory(num_clients: int, num_values: int) -> int:
        """16 bytes a value, whatever the number of clients."""
        return 16 * num_values


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
