"""DP-SGD of one client: gradients of single records, their clip, the noise, and the draw."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from scipy import stats

from fedllm_flwr.client.local_round import train_locally
from fedllm_flwr.config import Config
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.errors import NotFiniteError
from fedllm_flwr.federation.messages import Assignment
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.tasks import task_of
from fedllm_flwr.tasks.base import LocalWork
from fedllm_flwr.training.batches import RoundBatches
from fedllm_flwr.training.private import (
    ExampleLosses,
    add_clipped,
    catching,
    per_example,
    poisson_batches,
)
from toy_answers import random_answers
from toy_pairs import random_pairs

MakeConfig = Callable[..., Config]
BATCH = [3, 0, 7, 4, 9]
PRIVATE = {"unit": "record", "clip": 0.5, "noise_multiplier": 1.0}


def prepared(config: Config, examples: object) -> tuple[AdaptedModel, ExampleLosses, int]:
    """The model with an adapter whose gradients are nowhere zero, and the task's losses."""
    model, task = load_model(config), task_of(config)
    drawn = np.arange(len(examples))  # type: ignore[arg-type]
    batches = RoundBatches([drawn.tolist()], 1, len(drawn), 1, 1)
    work = LocalWork(config, model, examples, drawn, batches, 1e-2, 0)
    kept = task.prepare(work)
    rng = np.random.default_rng(1)
    model.load({n: rng.normal(0, 0.1, v.shape).astype(v.dtype) for n, v in model.initial.items()})
    model.peft.train()
    return model, task.example_losses(work, kept), task.rows_per_example


@pytest.mark.parametrize("task", ["sft", "dpo", "kto"])
def test_gradients_of_examples_are_those_of_each_alone_and_of_opacus(
    task: str, make_config: MakeConfig, random_examples: Callable[..., object]
) -> None:
    config = make_config(task={"name": task}, lora={"dropout": 0.0}, privacy=PRIVATE)
    make = {"sft": random_examples, "dpo": random_pairs, "kto": random_answers}[task]
    model, losses, rows_per_example = prepared(config, make(12))
    parameters = model.trainable()
    with catching(model, parameters) as rows:
        values, gradients = per_example(model, rows, losses, BATCH, rows_per_example)
    assert gradients.keys() == parameters.keys()
    for place, example in enumerate(BATCH):
        model.peft.zero_grad()
        alone = losses([example])
        alone.sum().backward()
        assert float(values[place]) == pytest.approx(float(alone.detach()), abs=1e-5)
        for name, parameter in parameters.items():
            torch.testing.assert_close(gradients[name][place], parameter.grad, rtol=1e-4, atol=1e-5)
    model.peft.zero_grad()
    watched = GradSampleModule(model.peft, loss_reduction="sum", strict=False)
    losses(BATCH).sum().backward()
    for name, parameter in parameters.items():
        found = parameter.grad_sample.view(rows_per_example, len(BATCH), *parameter.shape).sum(0)
        torch.testing.assert_close(gradients[name], found, rtol=1e-4, atol=1e-5)
        del parameter.grad_sample
    watched.remove_hooks()
    watched.disable_hooks()
    model.peft.zero_grad()


def test_a_records_gradient_is_clipped_as_one_vector_over_its_examples() -> None:
    """Record 5 has two examples, (3, 0) and (0, 4) together of norm 5; record 6 is within."""
    gradients = {
        "a": torch.tensor([[[3.0]], [[0.0]], [[0.1]]]),
        "b": torch.tensor([[[0.0]], [[4.0]], [[0.2]]]),
    }
    sums = {name: torch.zeros(1, 1) for name in gradients}
    add_clipped(sums, gradients, np.array([5, 5, 6]), 1.0)
    assert float(sums["a"]) == pytest.approx(0.6 + 0.1, abs=1e-5)
    assert float(sums["b"]) == pytest.approx(0.8 + 0.2, abs=1e-5)
    huge = {"a": torch.full((1, 2, 2), 3e38)}
    sums = {"a": torch.zeros(2, 2)}
    add_clipped(sums, huge, np.array([0]), 2.0)
    assert 1.99 < float(sums["a"].norm()) <= 2.0
    with pytest.raises(NotFiniteError, match="record's gradient"):
        add_clipped(sums, {"a": torch.full((1, 2, 2), math.nan)}, np.array([0]), 2.0)


def test_records_are_drawn_whole_and_each_by_itself() -> None:
    source = np.repeat(np.arange(200), 2)
    batches = poisson_batches(source, np.ones(400, np.int64), 200, 40)
    sizes = [len(step) for step in batches.batches]
    assert all(np.bincount(source[step]).max() == 2 for step in batches.batches if step)
    assert all(np.isin(np.bincount(source[step]), (0, 2)).all() for step in batches.batches)
    assert abs(np.mean(sizes) - 40) < 5 * math.sqrt(4 * 18 / 200)
    assert np.std(sizes) > 5
    assert batches.items_per_step == 40


def trained(config: Config, examples: object, root: Path, lr: float = 1.0) -> np.ndarray:
    """The update of one round, flat."""
    assignment = Assignment(1, load_model(config).initial, lr, config)
    delta = train_locally(assignment, ClientData("a", examples, examples), root).delta  # type: ignore[arg-type]
    return np.concatenate([delta[name].ravel() for name in sorted(delta)]).astype(np.float64)


SGD = {"max_steps": 1, "optimizer": "sgd", "max_grad_norm": 0.0}


def test_without_noise_and_bound_a_full_batch_is_the_plain_mean_gradient(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Of pairs, whose loss is a mean over them; that of sft is one over tokens."""
    pairs = random_pairs(8)
    options = {
        "task": {"name": "dpo"},
        "training": {**SGD, "batch_size": 8, "micro_batch_size": 4},
    }
    free = {"unit": "record", "clip": 1e9, "noise_multiplier": 0.0}
    private = trained(make_config(**options, privacy=free), pairs, tmp_path / "private")
    plain = trained(make_config(**options), pairs, tmp_path / "plain")
    np.testing.assert_allclose(private, plain, atol=1e-6)
    assert np.abs(plain).max() > 1e-3


def test_a_step_has_the_stated_noise_also_when_nobody_is_drawn(
    make_config: MakeConfig, random_examples: Callable[..., object], tmp_path: Path
) -> None:
    """A clip so small that the gradients vanish beside the noise z C / B."""
    privacy = {"unit": "record", "clip": 1e-3, "noise_multiplier": 500.0}
    config = make_config(training={**SGD, "batch_size": 1}, privacy=privacy)
    updates = [trained(config, random_examples(500), tmp_path) for _ in range(2)]
    for update in updates:
        assert 1e-4 < stats.chi2.cdf(np.square(update / 0.5).sum(), update.size) < 1 - 1e-4
    assert abs(np.corrcoef(*updates)[0, 1]) < 5 / math.sqrt(updates[0].size)


@pytest.mark.parametrize("engine", ["inprocess", "deployment"])
def test_a_site_tells_nothing_that_is_not_private(
    engine: str,
    make_config: MakeConfig,
    random_examples: Callable[..., object],
    tmp_path: Path,
) -> None:
    config = make_config(
        training={"max_steps": 1, "batch_size": 4}, federation={"engine": engine}, privacy=PRIVATE
    )
    examples = random_examples(20)
    assignment = Assignment(1, load_model(config).initial, 1e-2, config)
    update = train_locally(assignment, ClientData("a", examples, examples), tmp_path)  # type: ignore[arg-type]
    assert update.num_examples == 20
    assert ("loss" in update.metrics) == (engine == "inprocess")
    if engine == "deployment":
        assert update.metrics == {"steps": 1.0}
