"""Tensors as words of the ring of integers modulo 2^32, and sums of them back.

A value x within ``bound`` becomes round(x 2^f), to the nearest, ties to even. f is the largest
number of binary places for which the sum over all sites of a round cannot overflow the ring.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedllm_flwr.errors import FederationError, NotFiniteError
from fedllm_flwr.federation.secure.masks import Words
from fedllm_flwr.params import Array, Params

RING_BITS = 32


@dataclass(frozen=True)
class FixedPoint:
    """The fixed-point encoding of a round.

    Args:
        bound: largest magnitude of a value that a site may send.
        sites: largest number of sites whose vectors are summed.
    """

    bound: float
    sites: int

    @property
    def places(self) -> int:
        """f: sites (bound 2^f + 1/2) stays below 2^31."""
        return math.floor(math.log2((2.0 ** (RING_BITS - 1) / self.sites - 1) / self.bound))

    @property
    def resolution(self) -> float:
        """The distance between two adjacent values."""
        return 2.0**-self.places

    def encode(self, params: Mapping[str, Array], factor: float = 1.0) -> Words:
        """``factor`` times the tensors in name order, flat, as words.

        Raises:
            FederationError: a value is not finite or exceeds the bound; values never wrap around.
        """
        words = np.empty(sum(value.size for value in params.values()), np.uint32)
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
            scaled = np.multiply(value, factor * 2.0**self.places, dtype=np.float64)
            stop = start + value.size
            words[start:stop] = np.rint(scaled, out=scaled).ravel().astype(np.int64)
            start = stop
        return words

    def decode(self, words: Words, like: Mapping[str, Array], count: int) -> Params:
        """The sum of `count` sites' tensors in float64, with the names and shapes of `like`.

        Raises:
            FederationError: a value is impossible for `count` sites within the bound.
        """
        values = words.view(np.int32)
        most = count * (self.bound * 2.0**self.places + 0.5)
        if float(np.abs(values.astype(np.int64)).max(initial=0)) > most:
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
