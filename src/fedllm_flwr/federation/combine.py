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
        """At most 16 bytes per value, for any number of clients."""
        return 16 * num_values


class RunningMean:
    """Weighted mean of tensors added one at a time, bit-identical for every order of the terms.

    Floating-point sums depend on the order of their terms; integer sums do not. Each term
    ``weight * value`` is rounded to a multiple of 2^-63 and added to a pair of integer sums: one in
    units of 2^-16, and one for the remainder in units of 2^-63. Both are exact for values up to
    `LARGEST_VALUE`, a total weight up to `LARGEST_WEIGHT` and 2^16 terms, so the only error is the
    initial rounding, below 1e-19 per term. Memory: 12 bytes per value, or 16 for tensors whose
    terms may add up to 2^15 or more.
    """

    def __init__(self) -> None:
        self.weight: float = 0.0
        self.count: int = 0
        self._coarse: dict[str, Array] = {}  # int32, or int64 where the sum may need it
        self._fine: dict[str, Array] = {}  # int64
        self._most: dict[str, int] = {}  # bounds of the absolute values of `_coarse`
        self._taken = False

    def add(self, params: Mapping[str, Array], weight: float) -> None:
        """Add ``weight * params``; values as `check_like` accepts them, weights are counts or 1."""
        fits = self.weight + weight <= LARGEST_WEIGHT and self.count < 2**16
        if not (weight > 0 and fits) or self._taken:
            raise ValueError(f"cannot add weight {weight} to {self.count} terms of {self.weight}")
        for name, value in params.items():
            if name not in self._coarse:
                self._coarse[name] = np.zeros(value.shape, np.int32)
                self._fine[name] = np.zeros(value.shape, np.int64)
            rest = np.multiply(value, weight, dtype=np.float64)
            coarse = np.rint(rest * (1 / _COARSE))
            self._add_coarse(name, coarse)
            rest -= coarse * _COARSE  # exact: both are multiples of the last bit of the term
            rest *= 1 / _FINE
            self._fine[name] += np.rint(rest, out=rest).astype(np.int64)
        self.weight += weight
        self.count += 1

    def _add_coarse(self, name: str, term: Array) -> None:
        most = self._most.get(name, 0)
        most += int(max(term.max(initial=0.0), -term.min(initial=0.0)))
        self._most[name] = most
        total = self._coarse[name]
        if most > np.iinfo(total.dtype).max:
            total = self._coarse[name] = total.astype(np.int64)
        total += term.astype(total.dtype)

    def mean(self) -> Params:
        """The weighted mean in float64; see `sum_over`."""
        return self.sum_over(self.weight)

    def sum_over(self, denominator: float) -> Params:
        """The weighted sum divided by `denominator` instead of the total weight, in float64.

        The sums are freed tensor by tensor, so this is possible once, after the last term.
        """
        if self._taken:
            raise ValueError("the sums were taken already")
        self._taken, found = True, {}
        for name in list(self._coarse):
            total = self._coarse.pop(name) * _COARSE
            total += self._fine.pop(name) * _FINE
            total /= denominator
            found[name] = total
        return found
