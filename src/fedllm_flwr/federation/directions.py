"""How far the clients of a round move, and whether alike: norms and cosines of updates."""

from collections.abc import Mapping

import numpy as np

from fedllm_flwr.params import Array, Params, derive_seed

_BUCKETS = 8192  # m


class UpdateDirections:
    """Norms ||D_i||, and cosines of D_i to the round's weighted mean D, without keeping any D_i.

    Of each update a hashed sketch stays (Weinberger et al. 2009, feature hashing): every value is
    added to one of m buckets with a sign, both drawn by its tensor's name and its place. Sketches
    add up as updates do and keep inner products in the mean, with a standard deviation of at most
    sqrt(2 / m) ||x|| ||y||, 0.016 of a cosine, for 32 kB a client. Norms are exact.

    Args:
        like: the adapter; updates of other shapes, such as of another rank, have a norm alone.
    """

    def __init__(self, like: Params) -> None:
        self._shapes = {name: value.shape for name, value in like.items()}
        self._sketches: dict[str, tuple[Array, float]] = {}  # with the update's weight
        self.norms: dict[str, float] = {}

    def add(self, client: str, update: Params, weight: float) -> None:
        """Take note of a client's update."""
        squares = (float(np.vdot(v, v)) for v in map(np.float64, update.values()))
        self.norms[client] = float(np.sqrt(sum(squares)))
        if all(value.shape == self._shapes.get(name) for name, value in update.items()):
            self._sketches[client] = sketch(update).astype(np.float32), weight

    def cosines(self) -> dict[str, float]:
        """Cosine of each update to their weighted mean, by client; of updates that are not zero."""
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
    """The sums of m buckets, (m,)."""
    total = np.zeros(2 * _BUCKETS)
    for name, value in update.items():
        generator = np.random.default_rng(derive_seed("sketch", name))
        places = generator.integers(0, 2 * _BUCKETS, value.size, np.uint16)
        total += np.bincount(places, value.ravel(), 2 * _BUCKETS)
    return total[:_BUCKETS] - total[_BUCKETS:]  # the upper half has the other sign
