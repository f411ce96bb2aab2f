"""Combiners of the kinds that the interface has to carry, each against a plain computation.

One stacks, one takes a singular value decomposition, one needs all clients' values of a block of
coordinates. None is a part of the package.
"""

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fedllm_flwr.federation.combine import Combiner, WeightedMean
from fedllm_flwr.params import Params

RANK, ROWS, COLUMNS = 2, 6, 5
CLIENTS = {"ant": 10.0, "bee": 20.0, "cat": 40.0, "dog": 5.0}


def update_of(name: str) -> Params:
    rng = np.random.default_rng([*name.encode()])
    return {
        "lora_A": rng.normal(size=(RANK, COLUMNS)).astype(np.float32),
        "lora_B": rng.normal(size=(ROWS, RANK)).astype(np.float32),
    }


class Stacking(Combiner):
    """Concatenates the factors, so that B A is the weighted sum of the clients' (Wang et al. 2024).

    The rank grows with the number of clients.
    """

    def __init__(self) -> None:
        self._parts: dict[str, tuple[Params, float]] = {}

    def add(self, client: str, update: Params, weight: float) -> None:
        self._parts[client] = update, weight

    def combined(self) -> Params:
        parts = [self._parts[client] for client in sorted(self._parts)]
        total = sum(weight for _, weight in parts)
        a = [np.float64(weight / total) * update["lora_A"] for update, weight in parts]
        return {
            "lora_A": np.concatenate(a, 0),
            "lora_B": np.concatenate([u["lora_B"].astype(np.float64) for u, _ in parts], 1),
        }

    @staticmethod
    def memory(num_clients: int, num_values: int) -> int:
        return 4 * num_clients * num_values


class Refactored(Combiner):
    """The best factors of the weighted mean of the clients' products, by an SVD."""

    def __init__(self) -> None:
        self._stacked = Stacking()

    def add(self, client: str, update: Params, weight: float) -> None:
        self._stacked.add(client, update, weight)

    def combined(self) -> Params:
        factors = self._stacked.combined()
        u, s, vt = np.linalg.svd(factors["lora_B"] @ factors["lora_A"], full_matrices=False)
        return {
            "lora_A": np.sqrt(s[:RANK, None]) * vt[:RANK],
            "lora_B": u[:, :RANK] * s[:RANK] ** 0.5,
        }

    @staticmethod
    def memory(num_clients: int, num_values: int) -> int:
        return 4 * num_clients * num_values


class Median(Combiner):
    """The median of each coordinate, from files that are read a block of coordinates at a time."""

    block = 7

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add(self, client: str, update: Params, weight: float) -> None:
        self._shapes = {name: value.shape for name, value in update.items()}
        self._files[client] = Path(self._folder.name, f"{len(self._files)}.npy")
        flat = [value.reshape(-1) for _, value in sorted(update.items())]
        np.save(self._files[client], np.concatenate(flat))

    def combined(self) -> Params:
        opened = [np.load(self._files[client], mmap_mode="r") for client in sorted(self._files)]
        size = len(opened[0])
        flat = np.empty(size)
        for start in range(0, size, self.block):
            chosen = slice(start, start + self.block)
            flat[chosen] = np.median(np.stack([values[chosen] for values in opened]), axis=0)
        combined, start = {}, 0
        for name, shape in sorted(self._shapes.items()):
            stop = start + int(np.prod(shape))
            combined[name], start = flat[start:stop].reshape(shape), stop
        return combined

    @staticmethod
    def memory(num_clients: int, num_values: int) -> int:
        return 8 * num_values + 8 * num_clients * Median.block


def combine(kind: type[Combiner], order: list[str]) -> Params:
    combiner = kind()
    for name in order:
        combiner.add(name, update_of(name), CLIENTS[name])
    return combiner.combined()


def product(params: Params) -> np.ndarray:
    return params["lora_B"].astype(np.float64) @ params["lora_A"].astype(np.float64)


EXPECTED = sum(w * product(update_of(name)) for name, w in CLIENTS.items()) / sum(CLIENTS.values())


@pytest.mark.parametrize("kind", [WeightedMean, Stacking, Refactored, Median])
def test_the_order_of_replies_changes_no_bit(kind: type[Combiner]) -> None:
    one, other = combine(kind, list(CLIENTS)), combine(kind, list(reversed(CLIENTS)))
    assert {n: v.tobytes() for n, v in one.items()} == {n: v.tobytes() for n, v in other.items()}


def test_stacked_factors_are_the_exact_mean_of_the_products() -> None:
    stacked = combine(Stacking, list(CLIENTS))
    assert stacked["lora_A"].shape == (RANK * len(CLIENTS), COLUMNS)
    np.testing.assert_allclose(product(stacked), EXPECTED, rtol=1e-6)


def test_the_svd_is_the_closest_of_its_rank() -> None:
    u, s, vt = np.linalg.svd(EXPECTED)
    closest = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
    np.testing.assert_allclose(product(combine(Refactored, list(CLIENTS))), closest, atol=1e-6)


def test_the_median_is_numpys() -> None:
    found = combine(Median, list(CLIENTS))
    for name in ("lora_A", "lora_B"):
        values = np.stack([update_of(client)[name] for client in CLIENTS])
        np.testing.assert_array_equal(found[name], np.median(values, axis=0))


def test_the_mean_keeps_what_it_states_whatever_the_number_of_clients() -> None:
    shape, taken = (512, 1024), []
    for clients in (2, 8):
        mean, update = WeightedMean(), {"w": np.ones(shape, np.float32)}
        tracemalloc.start()
        for i in range(clients):
            mean.add(f"client-{i}", update, 1.0)
        taken.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        stated = WeightedMean.memory(clients, shape[0] * shape[1])
        assert taken[-1] < 1.01 * stated
    assert taken[1] < 1.01 * taken[0]
