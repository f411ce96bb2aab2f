"""SCAFFOLD's control variates on the client's disk: which file a round starts from and leaves."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.checkpoint import load_params
from fedllm_flwr.config import Config, changed
from fedllm_flwr.messages import LocalCorrection, Task
from fedllm_flwr.params import Params
from fedllm_flwr.training.control import ClientControl

STEPS, LEARNING_RATE = 4, 0.5


def params(value: float) -> Params:
    return {"a": np.full((2, 3), value, np.float32), "b": np.full(4, -value, np.float32)}


def task(server_round: int, control: Params | None, post_step: bool = False) -> Task:
    config = Config()
    config = changed(config, communication={"dtype": "float32"})
    correction = LocalCorrection(control_variates=True, post_step=post_step)
    return Task(server_round, params(0), LEARNING_RATE, config, correction, control)


def finish(directory: Path, server_round: int, gradient: float) -> Params:
    """One round whose mean gradient is known; returns the client's c_i at its start."""
    control = ClientControl.of(task(server_round, params(1)), directory)
    assert control.own is not None
    change = control.finish(params(0), params(gradient), STEPS)
    assert change is not None
    np.testing.assert_array_equal(change["a"], params(gradient)["a"] - control.own["a"])
    return control.own


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_nothing_without_control_variates(tmp_path: Path) -> None:
    control = ClientControl.of(task(1, None), tmp_path / "state")
    assert control.drift() is None
    assert control.finish(params(1), {}, STEPS) is None
    assert not (tmp_path / "state").exists()


def test_the_drift_is_c_minus_c_i(tmp_path: Path) -> None:
    finish(tmp_path, 1, gradient=0.25)
    drift = ClientControl.of(task(2, params(1)), tmp_path).drift()
    assert drift is not None
    np.testing.assert_array_equal(drift["a"], np.full((2, 3), 0.75))
    np.testing.assert_array_equal(drift["b"], np.full(4, -0.75))


@pytest.mark.parametrize(
    ("optimizer", "post_step", "expected"),
    [
        ("adamw", False, 0.125),  # the mean gradient
        ("sgd", False, 0 - 1 - 3 / (STEPS * LEARNING_RATE)),  # c_i - c - delta / (K lr)
        ("adamw", True, 0 - 1 - 3 / (STEPS * LEARNING_RATE)),
    ],
)
def test_the_new_variate(optimizer: str, post_step: bool, expected: float, tmp_path: Path) -> None:
    asked = task(1, params(1), post_step)
    asked = replace(asked, config=changed(asked.config, training={"optimizer": optimizer}))
    change = ClientControl.of(asked, tmp_path).finish(params(3), params(0.125), STEPS)
    assert change is not None
    np.testing.assert_array_equal(change["a"], np.full((2, 3), expected, np.float32))


def test_two_states_are_kept_and_the_newest_older_one_is_used(tmp_path: Path) -> None:
    for server_round in (1, 2, 5, 9):
        finish(tmp_path, server_round, gradient=server_round)
    assert names(tmp_path) == ["control-00005.safetensors", "control-00009.safetensors"]

    for server_round, expected in ((9, 5.0), (10, 9.0), (6, 5.0), (5, 0.0)):
        own = ClientControl.of(task(server_round, params(1)), tmp_path).own
        assert own is not None
        assert own["a"][0, 0] == expected


def test_a_round_repeated_after_a_crash_starts_and_ends_the_same(tmp_path: Path) -> None:
    finish(tmp_path, 1, gradient=0.5)
    first, file = finish(tmp_path, 2, gradient=0.75), tmp_path / "control-00002.safetensors"
    stored = load_params(file)[0]["control"]
    again = finish(tmp_path, 2, gradient=0.75)
    np.testing.assert_array_equal(first["a"], again["a"])
    np.testing.assert_array_equal(load_params(file)[0]["control"]["a"], stored["a"])


def test_rounds_taken_back_by_the_server_are_forgotten(tmp_path: Path) -> None:
    """After a return to round 2, round 3 goes on from the new round 2, not from the old ones."""
    for server_round in (1, 2, 3):
        finish(tmp_path, server_round, gradient=server_round)
    finish(tmp_path, 2, gradient=20)
    assert names(tmp_path) == ["control-00002.safetensors"]
    assert finish(tmp_path, 3, gradient=30)["a"][0, 0] == 20


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another_shape(path: Path) -> None:
    from fedllm_flwr.checkpoint import save_params

    save_params(path, {"control": {"a": np.zeros((9, 9), np.float32)}}, {})


def without_control(path: Path) -> None:
    from fedllm_flwr.checkpoint import save_params

    save_params(path, {"other": params(1)}, {})


@pytest.mark.parametrize("damage", [truncate, empty, of_another_shape, without_control])
def test_a_damaged_state_is_passed_over_and_logged(
    damage: Callable[[Path], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finish(tmp_path, 1, gradient=1)
    finish(tmp_path, 2, gradient=2)
    damage(tmp_path / "control-00002.safetensors")
    with caplog.at_level(logging.WARNING):
        assert finish(tmp_path, 3, gradient=3)["a"][0, 0] == 1
    (record,) = caplog.records
    assert "control-00002.safetensors is not used" in record.getMessage()


def test_a_lost_state_starts_at_zero_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finish(tmp_path, 1, gradient=1)
    (tmp_path / "control-00001.safetensors").unlink()
    with caplog.at_level(logging.INFO):
        assert finish(tmp_path, 2, gradient=2)["a"].tolist() == np.zeros((2, 3)).tolist()
    assert "round 2: no control variate on disk, starting at zero" in caplog.text


def test_client_and_server_agree_on_c_at_half_precision(tmp_path: Path) -> None:
    """What is stored is what the server adds up: c_i plus the difference as it travels."""
    total = np.zeros((2, 3), np.float32)
    for server_round in (1, 2, 3):
        asked = task(server_round, params(1))
        halved = changed(asked.config, communication={"dtype": "bfloat16"})
        asked = replace(asked, config=halved)
        control = ClientControl.of(asked, tmp_path)
        change = control.finish(params(0), params(0.1 * server_round), STEPS)
        assert change is not None
        total = total + change["a"]
    own = ClientControl.of(task(4, params(1)), tmp_path).own
    assert own is not None
    np.testing.assert_array_equal(own["a"], total)
    assert np.abs(own["a"] - 0.3).max() < 2e-3
