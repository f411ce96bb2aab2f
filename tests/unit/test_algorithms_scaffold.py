"""SCAFFOLD's client end: where a round starts from, and what it contributes and keeps."""

import numpy as np
import pytest

from fedllm_flwr.federation.algorithms.fedavg import FedAvg
from fedllm_flwr.federation.algorithms.scaffold import Scaffold
from fedllm_flwr.federation.rule import Aftermath
from fedllm_flwr.federation.updates.cast import round_trip
from fedllm_flwr.params import Params
from fedllm_flwr.training.local_terms import LocalResult

STEPS, LEARNING_RATE = 4, 0.5


def params(value: float) -> Params:
    return {"a": np.full((2, 3), value, np.float32), "b": np.full(4, -value, np.float32)}


def received(c: float) -> dict[str, Params]:
    return {"params": params(0), "control": params(c)}


def result(
    delta: float, gradient: float, steps: int = STEPS, optimizer: str = "adamw"
) -> LocalResult:
    return LocalResult(
        params(delta), params(delta), params(gradient), steps, LEARNING_RATE, optimizer
    )


def finish(rule: Scaffold, own: float, c: float, trained: LocalResult) -> Aftermath:
    return rule.finish(trained, received(c), {"control": params(own)}, dict)


def test_other_rules_add_nothing() -> None:
    terms = FedAvg().local_terms(received(1), {})
    assert (terms.offset, terms.mu, terms.averages_gradient) == (None, 0.0, False)
    assert FedAvg().finish(result(1, 1), received(1), {}, dict) == Aftermath()


def test_the_offset_is_c_minus_c_i() -> None:
    offset = Scaffold().local_terms(received(1), {"control": params(0.25)}).offset
    assert offset is not None
    np.testing.assert_array_equal(offset["a"], np.full((2, 3), 0.75))
    np.testing.assert_array_equal(offset["b"], np.full(4, -0.75))


def test_a_client_that_remembers_nothing_starts_at_zero() -> None:
    offset = Scaffold().local_terms(received(1), {}).offset
    assert offset is not None
    np.testing.assert_array_equal(offset["a"], np.ones((2, 3)))


@pytest.mark.parametrize(
    ("optimizer", "variant", "expected"),
    [
        ("adamw", "paper", 0.125),  # the mean gradient
        ("sgd", "paper", 0.5 - 1 - 3 / (STEPS * LEARNING_RATE)),  # c_i - c - delta / (K lr)
        ("adamw", "openfedllm", 0.5 - 1 - 3 / (STEPS * LEARNING_RATE)),
    ],
)
def test_the_new_variate(optimizer: str, variant: str, expected: float) -> None:
    rule = Scaffold(variant=variant)  # type: ignore[arg-type]
    after = finish(rule, 0.5, 1, result(3, 0.125, optimizer=optimizer))
    new, change = after.memory["control"], after.contributions["control_delta"]
    np.testing.assert_array_equal(new["a"], np.full((2, 3), expected, np.float32))
    np.testing.assert_array_equal(change["a"], new["a"] - 0.5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_round_whose_steps_were_all_skipped_leaves_the_variate(optimizer: str) -> None:
    after = finish(Scaffold(), 0.5, 1, result(0, 0, steps=0, optimizer=optimizer))
    np.testing.assert_array_equal(after.memory["control"]["a"], params(0.5)["a"])
    assert not after.contributions["control_delta"]["a"].any()


def test_what_is_remembered_is_what_the_server_adds_up_at_half_precision() -> None:
    """c_i plus the difference as it travels, over several rounds."""
    total, memory = np.zeros((2, 3), np.float32), {}
    for gradient in (0.1, 0.2, 0.3):
        after = Scaffold().finish(
            result(0, gradient), received(1), memory, lambda p: round_trip(p, "bfloat16")
        )
        memory = dict(after.memory)
        total = total + after.contributions["control_delta"]["a"]
    np.testing.assert_array_equal(memory["control"]["a"], total)
    assert np.abs(memory["control"]["a"] - 0.3).max() < 2e-3
