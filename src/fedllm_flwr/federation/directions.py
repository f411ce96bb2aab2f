"""Norms of client updates, and their cosines to the round's mean update."""

from collections.abc import Mapping

import numpy as np

from fedllm_flwr.params import Array, Params, derive_seed

_BUCKETS = 8192  # m


class UpdateDirections:
    """Norms ||D_i||, and cosines of D_i to the round's weighted mean D, without storing any D_i.

    Only a hashed sketch of each update is stored (feature hashing, Weinberger et al. 2009): every
    value is added to one of m buckets with a sign, both drawn from its tensor's name and its
    position; two values share a bucket with a probability of at most 1 / m. Sketches are linear,
    and their inner products are unbiased with a standard deviation of at most
    sqrt(2 / m) ||x|| ||y||, or 0.016 for a cosine, at 32 kB per client. Norms are exact.

    Args:
        like: the adapter; updates of other shapes, such as another rank, get only a norm.
    """

    def __init__(self, like: Params) -> None:
        self._shapes = {name: value.shape for name, value in like.items()}
        self._sketches: dict[str, tuple[Array, float]] = {}  # with the update's weight
        self.norms: dict[str, float] = {}

    def add(self, client: str, update: Params, weight: float) -> None:
        """Record a client's update."""
        squares = (float(np.vdot(v, v)) for v in map(np.float64, update.values()))
        self.norms[client] = float(np.sqrt(sum(squares)))
        if all(value.shape == self._shapes.get(name) for name, value in update.items()):
            self._sketches[client] = sketch(update).astype(np.float32), weight

    def cosines(self) -> dict[str, float]:
        """Cosine of each nonzero update to the weighted mean, by client."""
        ordered = sorted(self._sketches.items())
        if not ordered:
            return {}
        mean = sum(weight * value.astype(np.float64) for _, (value, weight) in ordered)
        found = {}
        for client, (value, _) in ordered:
            if size := float(np.linalg.norm(value) * np.linalg.norm(mean)):
                found[client] = min(1.0, max(-1.0, float(value @ mean) / size))
        return found


def sketch(update: Mapping[str, Array]) -> Array:
    """Sums of the m buckets, (m,).

    Each m consecutive values of a tensor are added to all buckets, from a random one on.
    """
    total = np.zeros(_BUCKETS)
    for name, value in update.items():
        generator = np.random.default_rng(derive_seed("sketch", name))
        bits = np.frombuffer(generator.bytes(-(-value.size // 8)), np.uint8)
        signs = 1 - 2 * np.unpackbits(bits, count=value.size).view(np.int8)
        signed = value.ravel() * signs
        for begin in range(0, value.size, _BUCKETS):
            part = signed[begin : begin + _BUCKETS]
            first = int(generator.integers(_BUCKETS))
            fit = min(part.size, _BUCKETS - first)
            total[first : first + fit] += part[:fit]
            total[: part.size - fit] += part[fit:]
    return total
