"""Sketched cosines against those of the updates themselves."""

import numpy as np
import pytest

from fedllm_flwr.federation.directions import UpdateDirections
from fedllm_flwr.params import Params

SHAPES = {"q.lora_A": (8, 300), "q.lora_B": (300, 8), "v.lora_A": (8, 500)}


def drawn(seed: int, common: float) -> Params:
    """An update that shares the direction `common` of a hundred with all others."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    return {
        name: (common * shared.normal(size=shape) + own.normal(size=shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("common", [0.0, 0.5, 3.0])
def test_norms_and_cosines_are_those_of_the_updates(common: float) -> None:
    weights = {f"c{i}": 1.0 + i for i in range(6)}
    updates = {name: drawn(i + 1, common) for i, name in enumerate(weights)}
    updates["c5"] = {name: -value for name, value in updates["c5"].items()}
    found = UpdateDirections(updates["c0"])
    for name in reversed(weights):  # in any order
        found.add(name, updates[name], weights[name])

    flat = {n: np.concatenate([u[k].ravel() for k in SHAPES]) for n, u in updates.items()}
    mean = sum(weights[name] * flat[name].astype(float) for name in weights)
    cosines = found.cosines()
    for name, value in flat.items():
        assert found.norms[name] == pytest.approx(np.linalg.norm(value), rel=1e-6)
        exact = value @ mean / np.linalg.norm(value) / np.linalg.norm(mean)
        assert cosines[name] == pytest.approx(exact, abs=4 * 0.016)


def test_updates_of_another_rank_and_of_nothing() -> None:
    like = drawn(1, 0.0)
    found = UpdateDirections(like)
    found.add("a", like, 1.0)
    found.add("lower rank", {"q.lora_A": np.ones((4, 300), np.float32)}, 1.0)
    found.add("zero", {name: np.zeros_like(value) for name, value in like.items()}, 1.0)
    assert found.norms["lower rank"] == pytest.approx(np.sqrt(1200))
    assert found.norms["zero"] == 0
    assert found.cosines() == {"a": pytest.approx(1.0)}
