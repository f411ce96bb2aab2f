"""Robust combiners, for rounds in which some clients may be malicious.

All of them weight clients uniformly, because a client could lie about its number of examples. Of n
replies, f = floor(``robust.liars`` n) may be arbitrary. Updates are stored in a temporary file; two
passes over blocks of coordinates compute the result, in float64, with the clients in name order.

There are two kinds. The median and the trimmed mean work per coordinate (`Coordinatewise`). The
others are affine combinations, sum_i a_i x_i, of the updates x_i and the last round's result x_0,
whose coefficients depend only on inner products (`Affine`).
"""

import math
import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import RobustConfig
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.combine import Combiner
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Array, Groups, Params

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

CENTRE = "centre"  # the last round's result, in the server's state
_BLOCK = 2**21  # values of all clients together that are in memory at a time


class Robust(Combiner):
    """Keeps a round's updates in a temporary file, a row of float32 values each."""

    robust: ClassVar[bool] = True
    keeps_centre: ClassVar[bool] = False

    def __init__(self, settings: RobustConfig | None = None, centre: Params | None = None) -> None:
        self.settings = settings or RobustConfig()
        self._file = tempfile.TemporaryFile(prefix="fedllm-updates-")  # noqa: SIM115
        self._clients: list[str] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._centre = centre
        self._result: Params = {}
        self._cut: dict[str, float] = {}

    @classmethod
    def of(cls, config: Config, state: ServerState) -> Self:
        """A combiner with the settings ``robust`` and, if kept, the last round's result."""
        return cls(config.robust, state.tensors.get(CENTRE) if cls.keeps_centre else None)

    def add(self, client: str, update: Params, weight: float) -> None:
        """Write the update to the file; its weight is ignored."""
        self._clients.append(client)
        self._shapes = {name: value.shape for name, value in sorted(update.items())}
        for _, value in sorted(update.items()):
            self._file.write(np.ascontiguousarray(value, np.float32).tobytes())

    def combined(self) -> Params:
        """The result; also sets `cut`.

        Raises:
            FederationError: there are too few replies for ``robust.liars``.
        """
        self._file.flush()
        size = sum(map(math.prod, self._shapes.values()))
        count = len(self._clients)
        rows: Array = np.memmap(self._file, np.float32, "r", shape=(count, size))
        order = sorted(range(count), key=self._clients.__getitem__)
        flat = np.empty(size)
        self._cut = dict(zip(sorted(self._clients), self._combine(rows, order, flat), strict=True))
        start, result = 0, {}
        for name, shape in self._shapes.items():
            stop = start + math.prod(shape)
            result[name], start = flat[start:stop].reshape(shape), stop
        self._result = result
        return result

    @property
    def cut(self) -> Mapping[str, float]:
        """The fraction of each client's update that the result excludes, from 0 to 1."""
        return self._cut

    @property
    def history(self) -> Groups:
        """The result, if the next round's combiner needs it."""
        return {CENTRE: self._result} if self.keeps_centre else {}

    @staticmethod
    def memory(num_clients: int, num_values: int) -> int:
        """The result, a block of all updates in float32 and float64, and memory for sorting it."""
        return 8 * num_values + 20 * _BLOCK

    @abstractmethod
    def _combine(self, rows: Array, order: list[int], result: Vector) -> Vector:
        """Fill `result` (values,) from `rows[order]` (n, values); return the cut fractions (n,)."""

    def _num_attackers(self, count: int) -> int:
        """f, the number of clients out of `count` that may be malicious."""
        return math.floor(round(self.settings.liars * count, 9))


def _blocks(rows: Array) -> list[slice]:
    count, size = rows.shape
    step = max(1, _BLOCK // count)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


class Coordinatewise(Robust):
    """The mean of each coordinate without its k largest and its k smallest values."""

    def _combine(self, rows: Array, order: list[int], result: Vector) -> Vector:
        count, size = rows.shape
        trimmed, attackers = self._trimmed(count), self._num_attackers(count)
        outside = np.zeros(count)
        for block in _blocks(rows):
            values = rows[:, block][order]  # (n, block)
            ordered = np.sort(values, axis=0)
            kept = ordered[trimmed : count - trimmed]
            result[block] = kept.mean(axis=0, dtype=np.float64)
            low, high = ordered[attackers], ordered[count - 1 - attackers]
            outside += ((values < low) | (values > high)).sum(axis=1)
        usual = 2 * attackers / count  # share of an update that is like the others
        cut: Vector = np.maximum(0.0, outside / size - usual) / (1 - usual)
        return cut

    @abstractmethod
    def _trimmed(self, count: int) -> int:
        """k, for n = `count` replies; 2 k < n."""


class TrimmedMean(Coordinatewise):
    """k = f (Yin et al. 2018, https://arxiv.org/abs/1803.01498, with beta = ``robust.liars``)."""

    def _trimmed(self, count: int) -> int:
        return self._num_attackers(count)


class Median(Coordinatewise):
    """The median, as the mean after trimming all but the middle one or two values."""

    def _trimmed(self, count: int) -> int:
        return (count - 1) // 2


class Affine(Robust):
    """sum_i a_i x_i over the updates and the centre x_0, which is 0 where none is kept."""

    def _combine(self, rows: Array, order: list[int], result: Vector) -> Vector:
        blocks, count = _blocks(rows), len(order)
        centre = np.zeros(rows.shape[1]) if self._centre is None else self._flat(self._centre)

        def points(block: slice) -> Matrix:
            """x_0 to x_n, shape (1 + n, block)."""
            return np.vstack([centre[None, block], rows[:, block][order].astype(np.float64)])

        # Inner products of x_i - x_0 keep their precision even if the updates are similar.
        gram = np.zeros((1 + count, 1 + count))
        for block in blocks:
            around = points(block) - centre[block]
            gram += around @ around.T
        coefficients, cut = self._coefficients(gram)  # (1 + n,), (n,)
        for block in blocks:
            result[block] = coefficients @ points(block)
        return cut

    def _flat(self, params: Params) -> Vector:
        parts = [np.asarray(value, np.float64).ravel() for _, value in sorted(params.items())]
        return np.concatenate(parts)

    @abstractmethod
    def _coefficients(self, gram: Matrix) -> tuple[Vector, Vector]:
        """a_0 to a_n, whose sum is 1, and the fraction cut from each update, (n,).

        Args:
            gram: inner products of x_i - x_0, shape (1 + n, 1 + n); row and column 0 are zero.
        """

    @staticmethod
    def memory(num_clients: int, num_values: int) -> int:
        """As the others, with the centre."""
        return Robust.memory(num_clients, num_values) + 8 * num_values


def _distances(gram: Matrix, coefficients: Vector) -> Vector:
    """||x_i - v|| for v = sum_j a_j x_j, shape (1 + n,)."""
    squares = np.diag(gram) - 2 * gram @ coefficients + coefficients @ gram @ coefficients
    return np.sqrt(np.maximum(squares, 0.0))


class Krum(Affine):
    """The mean of the m updates with the lowest scores (multi-Krum; m = 1 is Krum).

    An update's score is the sum of its squared distances to its n - f - 2 nearest others.
    Blanchard et al. 2017, https://arxiv.org/abs/1703.02757
    """

    def _coefficients(self, gram: Matrix) -> tuple[Vector, Vector]:
        inner = gram[1:, 1:]
        count = len(inner)
        attackers = self._num_attackers(count)
        if count < 2 * attackers + 3:
            raise FederationError(
                f"algorithm.combiner=krum needs 2 f + 3 = {2 * attackers + 3} replies where "
                f"f = {attackers} of {count} may be malicious; lower "
                f"robust.liars={self.settings.liars:g} or ask more clients."
            )
        squares = np.diag(inner)[:, None] + np.diag(inner)[None] - 2 * inner
        np.fill_diagonal(squares, np.inf)
        scores = np.sort(squares, axis=1)[:, : count - attackers - 2].sum(axis=1)
        chosen = np.argsort(scores, kind="stable")[: self.settings.average or count - attackers]
        cut = np.ones(count)
        cut[chosen] = 0.0
        return np.concatenate([[0.0], (1 - cut) / len(chosen)]), cut


class GeometricMedian(Affine):
    """argmin_v sum_i ||x_i - v|| by the smoothed Weiszfeld algorithm.

    From the mean, ``robust.steps`` times v = sum_i w_i x_i / sum_i w_i with
    w_i = 1 / max(``robust.smoothing``, ||x_i - v||). The few steps of the paper stay near a mean
    that malicious clients have moved far away; on inner products, a hundred steps cost no more.
    Pillutla et al. 2022, https://arxiv.org/abs/1912.13445, Algorithm 2.
    """

    def _coefficients(self, gram: Matrix) -> tuple[Vector, Vector]:
        count = len(gram) - 1
        shares = np.concatenate([[0.0], np.full(count, 1 / count)])
        for _ in range(self.settings.steps or 100):
            weights = 1 / np.maximum(self.settings.smoothing, _distances(gram, shares)[1:])
            shares[1:] = weights / weights.sum()
        return shares, np.maximum(0.0, 1 - count * shares[1:])


class NormBound(Affine):
    """The mean of x_i min(1, tau / ||x_i||): no update moves the adapter further than tau / n.

    tau is ``robust.radius``, or the median of the round's norms. Sun et al. 2019,
    https://arxiv.org/abs/1911.07963
    """

    def _coefficients(self, gram: Matrix) -> tuple[Vector, Vector]:
        kept = _bounded(np.sqrt(np.diag(gram)[1:]), self.settings.radius)
        shares = kept / len(kept)
        return np.concatenate([[1 - shares.sum()], shares]), 1 - kept


class CentredClip(NormBound):
    """v <- v + mean_i (x_i - v) min(1, tau / ||x_i - v||), ``robust.steps`` times from x_0.

    x_0 is the last round's result, 0 at first; the x_i are the clients' momenta, see
    ``robust.momentum``. tau is ``robust.radius``, or the median of the distances at each step.
    Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333, Algorithm 2.
    """

    keeps_centre = True

    def _coefficients(self, gram: Matrix) -> tuple[Vector, Vector]:
        shares = np.zeros(len(gram))
        shares[0] = 1.0
        kept = np.ones(len(gram) - 1)
        for _ in range(self.settings.steps or 5):
            kept = _bounded(_distances(gram, shares)[1:], self.settings.radius)
            steps = kept / len(kept)
            shares *= 1 - steps.sum()
            shares[1:] += steps
        return shares, 1 - kept


def _bounded(lengths: Vector, radius: float | None) -> Vector:
    """min(1, tau / length) by update; tau None: the median of the lengths."""
    limit = float(np.median(lengths)) if radius is None else radius
    return np.divide(limit, lengths, out=np.ones_like(lengths), where=lengths > limit)
