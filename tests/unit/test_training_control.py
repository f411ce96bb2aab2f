"""SCAFFOLD's control variate of one client: where a round starts from, and what it leaves."""

import numpy as np
import pytest

from fedllm_flwr.config import Config, changed
from fedllm_flwr.federation.control import ClientControl
from fedllm_flwr.federation.messages import Task
from fedllm_flwr.params import Params
from fedllm_flwr.training.local_terms import LocalCorrection

STEPS, LEARNING_RATE = 4, 0.5


def params(value: float) -> Params:
    return {"a": np.full((2, 3), value, np.float32), "b": np.full(4, -value, np.float32)}


def task(
    control: Params | None,
    as_openfedllm: bool = False,
    optimizer: str = "adamw",
    dtype: str = "float32",
) -> Task:
    config = changed(Config(), training={"optimizer": optimizer}, communication={"dtype": dtype})
    correction = LocalCorrection(control_variates=True, as_openfedllm=as_openfedllm)
    return Task(1, params(0), LEARNING_RATE, config, correction, control)


def test_nothing_without_control_variates() -> None:
    control = ClientControl.of(task(None), None)
    assert control.drift() is None
    assert control.finish(params(1), {}, STEPS) == (None, None)


def test_the_drift_is_c_minus_c_i() -> None:
    drift = ClientControl.of(task(params(1)), params(0.25)).drift()
    assert drift is not None
    np.testing.assert_array_equal(drift["a"], np.full((2, 3), 0.75))
    np.testing.assert_array_equal(drift["b"], np.full(4, -0.75))


def test_a_client_that_remembers_nothing_starts_at_zero() -> None:
    own = ClientControl.of(task(params(1)), None).own
    assert own is not None
    assert not any(value.any() for value in own.values())


@pytest.mark.parametrize(
    ("optimizer", "as_openfedllm", "expected"),
    [
        ("adamw", False, 0.125),  # the mean gradient
        ("sgd", False, 0.5 - 1 - 3 / (STEPS * LEARNING_RATE)),  # c_i - c - delta / (K lr)
        ("adamw", True, 0.5 - 1 - 3 / (STEPS * LEARNING_RATE)),
    ],
)
def test_the_new_variate(optimizer: str, as_openfedllm: bool, expected: float) -> None:
    control = ClientControl.of(task(params(1), as_openfedllm, optimizer), params(0.5))
    new, change = control.finish(params(3), params(0.125), STEPS)
    assert new is not None
    assert change is not None
    np.testing.assert_array_equal(new["a"], np.full((2, 3), expected, np.float32))
    np.testing.assert_array_equal(change["a"], new["a"] - 0.5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_round_whose_steps_were_all_skipped_leaves_the_variate(optimizer: str) -> None:
    control = ClientControl.of(task(params(1), optimizer=optimizer), params(0.5))
    new, change = control.finish(params(0), params(0), steps=0)
    assert new is not None
    assert change is not None
    np.testing.assert_array_equal(new["a"], params(0.5)["a"])
    assert not change["a"].any()


def test_what_is_remembered_is_what_the_server_adds_up_at_half_precision() -> None:
    """c_i plus the difference as it travels, over several rounds."""
    total, own = np.zeros((2, 3), np.float32), None
    for gradient in (0.1, 0.2, 0.3):
        asked = task(params(1), dtype="bfloat16")
        own, change = ClientControl.of(asked, own).finish(params(0), params(gradient), STEPS)
        assert own is not None
        assert change is not None
        total = total + change["a"]
    np.testing.assert_array_equal(own["a"], total)
    assert np.abs(own["a"] - 0.3).max() < 2e-3
