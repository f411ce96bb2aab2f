"""Gaussian noise and secret sampling from a cryptographic generator.

Every `Noise` has a fresh 256-bit key from the operating system, which is never stored, sent or
derived from anything. So no run seed predicts the noise, and no two releases share it. A round that
is repeated after an interruption draws new noise and is accounted for as another release. If noise
depended on the run's seed, anyone who knows the seed could subtract it; if it depended on a stored
key, it would cancel in the difference of two releases.

The stream is AES-256 in counter mode; the Box-Muller transform in float64 makes normal numbers.
Noise is added before any rounding to the wire's or the adapter's dtype. There is no defence against
attacks on the last bits of floating-point noise (Mironov 2012).
"""

import math
import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedllm_flwr.params import Params

_BYTES = 8  # per uniform number, of which the upper 53 bits are used
_CHUNK = 2**16  # candidates of a discrete Gaussian per chunk, which fit into the cache


class Noise:
    """An endless stream of secret random numbers."""

    def __init__(self) -> None:
        key, counter = secrets.token_bytes(32), bytes(16)
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Uniform numbers in (0, 1], shape (count,)."""
        bits = np.frombuffer(self._stream.update(bytes(_BYTES * count)), np.uint64)
        return ((bits >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Standard normal numbers (Box and Muller 1958)."""
        count = int(np.prod(shape))
        half = -(-count // 2)
        radius = np.sqrt(-2 * np.log(self.uniform(half)))
        angle = 2 * np.pi * self.uniform(half)
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return both[:count].reshape(shape)

    def on(self, params: Params, deviation: float) -> Params:
        """`params` plus independent Gaussian noise of `deviation` on every value, in float64."""
        return {
            name: value + deviation * self.normal(value.shape)
            for name, value in sorted(params.items())
        }

    def discrete_normal(self, count: int, deviation: float) -> NDArray[np.int64]:
        """Integers x with probability proportional to exp(-x^2 / (2 deviation^2)), shape (count,).

        Rejection sampling from a discrete Laplace distribution, by algorithms 2 and 3 of Canonne,
        Kamath and Steinke 2020, "The Discrete Gaussian for Differential Privacy", with t the power
        of two above the deviation. Every integer has a positive probability, so no floating-point
        bits leak. Bernoulli(e^-x) is sampled in float64, with a relative error of about 2^-50.
        """
        scale = 1 << max(0, math.ceil(math.log2(deviation)))  # t
        found, missing = [np.empty(0, np.int64)], count
        while missing > 0:
            size = min(_CHUNK, 3 * missing + 16)
            bits = np.frombuffer(self._stream.update(bytes(_BYTES * size)), np.uint64)
            rest = (bits & np.uint64(scale - 1)).astype(np.int64)  # uniform below t
            negative = bits >> np.uint64(63) == 1
            taken = self.uniform(size) <= np.exp(rest * (-1 / scale))
            rest, negative = rest[taken], negative[taken]
            length = rest + scale * np.floor(-np.log(self.uniform(rest.size))).astype(np.int64)
            away = (length - deviation**2 / scale) / deviation
            taken = self.uniform(rest.size) <= np.exp(-0.5 * np.square(away))
            taken &= ~(negative & (length == 0))
            found.append(np.where(negative, -length, length)[taken][:missing])
            missing -= found[-1].size
        return np.concatenate(found)

    def poisson_sample(self, count: int, share: float) -> NDArray[np.int64]:
        """Indices of a Poisson sample: each of `count` independently with probability `share`."""
        return np.flatnonzero(self.uniform(count) <= share)

    def fixed_sample(self, count: int, size: int) -> NDArray[np.int64]:
        """Indices of a uniformly random subset of `size` out of `count`, ascending."""
        return np.sort(np.argsort(self.uniform(count), kind="stable")[:size])
