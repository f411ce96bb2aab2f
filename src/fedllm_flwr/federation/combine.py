"""Combiners: aggregate the accepted client updates of a round into one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np

from fedllm_flwr.config import Config
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import LARGEST_WEIGHT, Array, Groups, Params

_COARSE, _FINE = 2.0**-16, 2.0**-63  # units of `RunningMean`


class Combiner(ABC):
    """Aggregates the accepted updates of one round, which it receives one at a time.

    Each round gets a new combiner. Its result must not depend on the order in which updates
    arrive, so that repeated simulations give identical bits. Combiners are registered by name
    (`plugins.COMBINERS`) and report their memory use: ``memory(n, values)``.

    A combiner that needs all updates at once, for a median or a singular value decomposition, may
    keep them in memory, or write them to files and read them back in blocks of coordinates. Each
    update comes with its client's name, so that the combiner can sort them.
    """

    robust: ClassVar[bool] = False
    """Whether it defends against malicious clients; the settings ``robust`` then apply."""

    @classmethod
    def of(cls, config: Config, state: ServerState) -> Self:
        """A combiner for one round, from the configuration and the state before the round."""
        return cls()

    @property
    def cut(self) -> Mapping[str, float]:
        """The fraction of each client's update that the result excludes, from 0 to 1."""
        return {}

    @property
    def history(self) -> Groups:
        """Groups of tensors to store in ``state.tensors`` for the next round's combiner."""
        return {}

    @abstractmethod
    def add(self, client: str, update: Params, weight: float) -> None:
        """Add the update of `client`, already validated; called once per client."""

    @abstractmethod
    def combined(self) -> Params:
        """The aggregated update, in float64, with the names and shapes of the adapter."""

    @staticmethod
    @abstractmethod
    def memory(num_clients: int, num_values: int) -> int:
        """Bytes of memory needed for `num_clients` updates of `num_values` values each."""


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
        """16 bytes per value, for any number of clients."""
        return 16 * num_values


class RunningMean:
    """Weighted mean of tensors added one at a time, bit-identical for every order of the terms.

    Floating-point sums depend on the order of their terms; integer sums do not. Each term
    ``weight * value`` is rounded to a multiple of 2^-63 and added to a pair of int64 sums: one in
    units of 2^-16, and one for the remainder in units of 2^-63. Both are exact for values up to
    `LARGEST_VALUE`, a total weight up to `LARGEST_WEIGHT` and 2^16 terms, so the only error is the
    initial rounding, below 1e-19 per term. Memory: 16 bytes per value.
    """

    def __init__(self) -> None:
        self.weight: float = 0.0
        self.count: int = 0
        self._coarse: dict[str, Array] = {}
        self._fine: dict[str, Array] = {}

    def add(self, params: Mapping[str, Array], weight: float) -> None:
        """Add ``weight * params``; values as `check_like` accepts them, weights are counts or 1."""
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
