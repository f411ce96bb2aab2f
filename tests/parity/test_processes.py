"""A client's round on two CPU processes against the round of one process.

The gradients are the same sums in another order, so that adapters differ by rounding only. The
other process is kept over the tests, as it is over rounds.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.client.local_round import train_locally
from fedllm_flwr.client.processes import processes
from fedllm_flwr.config import Config, changed
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.federation.messages import Acknowledged, Assignment, Update
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.params import Params
from toy_answers import random_answers
from toy_pairs import random_pairs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

LEARNING_RATE = 1e-2
TOLERANCE = 2e-5  # absolute; AdamW moves a weight by up to 1e-2 a step

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    yield
    processes.end()


OPENFEDLLM = {"algorithm": {"mu": 20.0, "variant": "openfedllm"}}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {},
    "sft in one pass": {"training": {"micro_batch_size": 8}},
    "sft packed, accumulated, sgd": {
        "training": {"packing": True, "gradient_accumulation_steps": 2, "optimizer": "sgd"}
    },
    "sft, fedprox": {"algorithm": {"mu": 20.0}},
    "sft, the proximal term in the loss": OPENFEDLLM,
    "sft, scaffold": {"algorithm": {"name": "scaffold"}},
    "sft, only B": {"algorithm": {"factors": "b"}},
    "dpo": {"task": {"name": "dpo"}},
    "dpo, scaffold": {"task": {"name": "dpo"}, "algorithm": {"name": "scaffold"}},
    "dpo, fedprox": {"task": {"name": "dpo"}, "algorithm": {"mu": 20.0}},
    "dpo, the proximal term in the loss": {"task": {"name": "dpo"}, **OPENFEDLLM},
    "kto": {"task": {"name": "kto"}, "kto": {"beta": 0.5}},
}


def adapter(config: Config, seed: int = 5, scale: float = 0.1) -> Params:
    """A global adapter whose matrices are all non-zero, as after some rounds."""
    rng = np.random.default_rng(seed)
    shapes = {name: value.shape for name, value in load_model(config).initial.items()}
    return {n: rng.normal(0, scale, shape).astype(np.float32) for n, shape in shapes.items()}


def train(config: Config, data: ClientData, state: Path, count: int) -> list[Update]:
    """Two rounds of a client on `count` processes."""
    config = changed(config, federation={"client_processes": count})
    sent = {"control": adapter(config, 6, 0.02)} if config.algorithm.name == "scaffold" else {}
    return [
        train_locally(
            Assignment(
                round,
                adapter(config),
                LEARNING_RATE,
                config,
                sent,
                acknowledged=Acknowledged(round - 1, round - 1),
            ),
            data,
            state,
        )
        for round in (1, 2)
    ]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(
    name: str, make_config: MakeConfig, random_examples: Callable[..., Any], tmp_path: Path
) -> None:
    training = {"max_steps": 4, "batch_size": 8, "max_grad_norm": 0.5}
    config = changed(make_config(training=training, lora={"dropout": 0.0}), **CASES[name])
    make = {"sft": random_examples, "dpo": random_pairs, "kto": random_answers}
    examples = make[config.task.name](50)
    data = ClientData("a", examples, examples)

    one = train(config, data, tmp_path / "one", 1)
    two = train(config, data, tmp_path / "two", 2)
    again = train(config, data, tmp_path / "again", 2)
    for expected, found, repeated in zip(one, two, again, strict=True):
        for group in ("delta", *expected.contributed):
            deltas = [
                update.delta if group == "delta" else update.contributed[group]
                for update in (expected, found, repeated)
            ]
            for tensor, value in deltas[0].items():
                np.testing.assert_allclose(deltas[1][tensor], value, rtol=0, atol=TOLERANCE)
                assert deltas[1][tensor].tobytes() == deltas[2][tensor].tobytes()
        moved = max(float(np.abs(value).max()) for value in expected.delta.values())
        assert moved > 50 * TOLERANCE
        for metric in expected.metrics.keys() - {"seconds", "computed_tokens"}:
            assert found.metrics[metric] == pytest.approx(expected.metrics[metric], 1e-4, 1e-5), (
                metric
            )
        assert found.metrics.keys() == expected.metrics.keys()
        assert found.num_examples == expected.num_examples


def test_the_tolerance_sees_a_term_that_is_added_twice(
    make_config: MakeConfig, random_examples: Callable[..., Any], tmp_path: Path
) -> None:
    """If both processes added the proximal term of the loss, mu would be twice as large."""
    training = {"max_steps": 4, "batch_size": 8, "max_grad_norm": 0.5}
    config = make_config(training=training, lora={"dropout": 0.0})
    examples = random_examples(50)
    data = ClientData("a", examples, examples)
    once, twice = (
        train(changed(config, algorithm={"mu": mu, "variant": "openfedllm"}), data, tmp_path, 1)
        for mu in (20.0, 40.0)
    )
    apart = [float(np.abs(once[0].delta[n] - value).max()) for n, value in twice[0].delta.items()]
    assert max(apart) > 10 * TOLERANCE
