"""Canaries, the bound on epsilon from guesses about them, and tokens read off gradients."""

from collections.abc import Callable

import numpy as np
import pytest

from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import compose
from fedllm_flwr.data.canaries import canaries
from fedllm_flwr.data.client_data import divided_data
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.evaluation.inversion import first_layer, tokens_recovered
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.privacy.one_run import guessed_bound, lower_bound, p_value
from fedllm_flwr.tasks import task_of
from fedllm_flwr.tasks.base import LocalWork
from fedllm_flwr.training.batches import RoundBatches

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize(
    ("num", "guesses", "right", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_the_bound_of_the_paper(
    num: int, guesses: int, right: int, delta: float, published: float
) -> None:
    """Steinke et al. 2023, appendix D and section 7."""
    found = lower_bound(num, guesses, right, delta, 0.05)
    assert found == pytest.approx(published, abs=1e-3)
    assert p_value(num, guesses, right, found, delta) == pytest.approx(0.05, abs=1e-4)


def test_guesses_bound_epsilon_from_below_and_seldom_too_high() -> None:
    """Randomised response of epsilon 1 on each canary: at most 5 % of the bounds exceed 1."""
    rng, epsilon, above = np.random.default_rng(0), 1.0, 0
    for _ in range(200):
        members = rng.random(100) < 0.5
        truthful = rng.random(100) < 1 / (1 + np.exp(-epsilon))
        scores = np.where(members == truthful, 1.0, 0.0) + 0.1 * rng.random(100)
        above += guessed_bound(scores, members, 0.0)[0] > epsilon
    assert above <= 10
    members = rng.random(400) < 0.5
    bound, guesses, right = guessed_bound(members + 0.1 * rng.random(400), members, 1e-5)
    assert bound > 2
    assert right == guesses


def test_half_of_the_canaries_are_planted_and_belong_to_clients() -> None:
    run = ["data.max_samples=60", "partition=iid", "federation.num_clients=3", "seed=4"]
    plain, config = compose(run), compose([*run, "privacy.canaries=200"])
    all_of_them = canaries(config)
    planted = [canary.messages for canary in all_of_them if canary.planted]
    assert 70 < len(planted) < 130
    assert len({canary.messages[-1]["content"] for canary in all_of_them}) == 200
    kind = task_of(config).records
    source, clients = divided_data(config, kind)
    records = list(source.train)
    assert [record.messages for record in records[60:]] == planted
    assert records[:60] == list(divided_data(plain, kind)[0].train)
    assert sorted(np.concatenate(clients.indices)) == list(range(60 + len(planted)))


def test_canaries_need_a_simulation_of_sft() -> None:
    for other in ("task=dpo", "federation.engine=deployment federation.num_clients=3"):
        with pytest.raises(ConfigError, match=r"privacy\.canaries=9 are planted in .* set privacy"):
            compose(["privacy.canaries=9", *other.split()])


def test_a_gradient_gives_away_the_tokens_of_a_short_record_but_not_with_noise(
    make_config: MakeConfig, random_examples: Callable[..., Encoded]
) -> None:
    """8 tokens under three matrices A of rank 8: all of them lie in the span of the rows."""
    config = make_config(lora={"r": 8, "dropout": 0.0, "target_modules": "all-linear"})
    model, records = load_model(config), random_examples(40, shortest=8, longest=8)
    rng = np.random.default_rng(1)
    model.load({n: rng.normal(0, 0.1, v.shape).astype(v.dtype) for n, v in model.initial.items()})
    layer = first_layer(model)
    assert sorted(name.split(".")[-3] for name in layer.names) == ["k_proj", "q_proj", "v_proj"]
    every = np.arange(len(records))
    work = LocalWork(config, model, records, every, RoundBatches([], 1, 1, 1, 1), 1.0, 0)
    losses, batches = task_of(config).example_losses(work, {}), [[i] for i in range(12)]
    found, control = tokens_recovered(model, losses, records, layer, batches, config)
    # The last token is nobody's input.
    assert found.mean() > 0.8
    assert control.mean() < 0.2
    noisy = make_config(privacy={"unit": "record", "clip": 1.0, "noise_multiplier": 1.0})
    found, control = tokens_recovered(model, losses, records, layer, batches, noisy)
    assert found.mean() < 0.2
