"""Tensors as words of the ring of integers modulo 2^32 or 2^16, and sums of them back.

A value x within ``bound`` becomes x 2^f, rounded to the nearest, ties to even, or at random so that
its expectation stays. f is such that the sum over all sites of a round cannot overflow the ring.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.errors import FederationError, NotFiniteError
from fedllm_flwr.federation.secure.masks import Words, words_of
from fedllm_flwr.params import Array, Params

Uniform = Callable[[int], NDArray[np.float64]]  # so many random numbers in (0, 1]


@dataclass(frozen=True)
class FixedPoint:
    """The fixed-point encoding of a round.

    Args:
        bound: largest magnitude of a value that a site may send.
        places: f, the number of binary places.
        bits: of the ring.
        noise: largest magnitude of the noise in a sum, in multiples of 2^-f, without that for which
            the bound has room.
    """

    bound: float
    places: int
    bits: int = 32
    noise: float = 0.0

    @classmethod
    def finest(cls, bound: float, sites: int) -> "FixedPoint":
        """That of 32 bits: f is the largest for which sites (bound 2^f + 1/2) stays below 2^31."""
        return cls(bound, math.floor(math.log2((2.0**31 / sites - 1) / bound)))

    @property
    def resolution(self) -> float:
        """The distance between two adjacent values."""
        return 2.0**-self.places

    def largest(self, count: int) -> float:
        """Largest magnitude of a sum of `count` sites' words, and of the noise."""
        return count * (self.bound * 2.0**self.places + 1) + self.noise

    def encode(
        self, params: Mapping[str, Array], factor: float = 1.0, uniform: Uniform | None = None
    ) -> Words:
        """``factor`` times the tensors in name order, flat, as words.

        Args:
            uniform: random numbers for rounding x up with probability x - floor(x); None: to the
                nearest.

        Raises:
            FederationError: a value is not finite or exceeds the bound; values never wrap around.
        """
        words = np.empty(sum(value.size for value in params.values()), words_of(self.bits))
        start = 0
        for name, value in sorted(params.items()):
            largest = float(np.abs(value).max(initial=0.0))
            if not math.isfinite(largest):
                raise NotFiniteError(f"{name!r} holds NaN or Inf", "its update holds NaN or Inf")
            if largest > self.bound:
                text = (
                    f"{name!r} holds {largest:.3g}, beyond privacy.secure_range={self.bound:g}; "
                    "raise it"
                )
                raise FederationError(text, text)
            scaled = np.multiply(value, factor * 2.0**self.places, dtype=np.float64).ravel()
            if uniform is None:
                np.rint(scaled, out=scaled)
            else:
                np.floor(scaled + (1 - uniform(scaled.size)), out=scaled)
            stop = start + value.size
            words[start:stop] = scaled.astype(np.int64)
            start = stop
        return words

    def decode(self, words: Words, like: Mapping[str, Array], count: int) -> Params:
        """The sum of `count` sites' tensors in float64, with the names and shapes of `like`.

        Raises:
            FederationError: a value is impossible for `count` sites within the bound.
        """
        values = signed(words)
        if float(np.abs(values.astype(np.int64)).max(initial=0)) > self.largest(count):
            raise FederationError(
                f"a sum of {count} sites exceeds what they may send; one of them has lied, or its "
                "masks are not what they should be"
            )
        params, start = {}, 0
        for name, value in sorted(like.items()):
            stop = start + value.size
            params[name] = values[start:stop].reshape(value.shape) * 2.0**-self.places
            start = stop
        return params

    def round_trip(self, params: Params) -> Params:
        """`params` as decoded by the server: rounded, in their own dtype."""
        decoded = self.decode(self.encode(params), params, 1)
        return {name: value.astype(params[name].dtype) for name, value in decoded.items()}


def signed(words: Words) -> NDArray[np.signedinteger[Any]]:
    """Words as the integers next to zero that they stand for; the same memory."""
    return words.view(f"i{words.itemsize}")
