"""Learning rate over the rounds, steps, number of clients, and which examples a round draws."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.config.participation import num_sampled
from fedllm_flwr.config.schema import AlgorithmConfig, Config, FederationConfig, TrainingConfig
from fedllm_flwr.training.schedule import cosine_learning_rate, draw_examples, steps_per_round

sizes = st.integers(1, 60)
seeds = st.integers(0, 2**63 - 1)


def stream(size: int, count: int, rounds: int, seed: int, client: str) -> list[int]:
    """What a client draws when it takes part in every round."""
    windows = [draw_examples(size, count, before, seed, client) for before in range(rounds)]
    return np.concatenate(windows).tolist()


@given(size=sizes, count=sizes, seed=seeds, client=st.text(max_size=5))
def test_every_pass_covers_the_data_once(size: int, count: int, seed: int, client: str) -> None:
    rounds = math.ceil(3 * size / count)

    drawn = stream(size, count, rounds, seed, client)

    for start in range(0, 3 * size, size):
        assert sorted(drawn[start : start + size]) == list(range(size))


@given(size=sizes, seed=seeds, counts=st.lists(sizes, min_size=1, max_size=4))
def test_stream_does_not_depend_on_the_window(size: int, seed: int, counts: list[int]) -> None:
    length = min(count * math.ceil(60 / count) for count in counts)

    streams = [stream(size, count, math.ceil(60 / count), seed, "ann") for count in counts]

    assert all(drawn[:length] == streams[0][:length] for drawn in streams)


@given(size=sizes, count=sizes, updates=st.integers(0, 10**6), seed=seeds)
def test_a_round_needs_no_memory_of_the_others(
    size: int, count: int, updates: int, seed: int
) -> None:
    first = draw_examples(size, count, updates, seed, "ann")

    draw_examples(size, count, 0, seed, "bob")
    again = draw_examples(size, count, updates, seed, "ann")

    assert first.tolist() == again.tolist()
    assert first.shape == (count,)
    assert first.min() >= 0
    assert first.max() < size


def test_seeds_clients_and_passes_draw_in_different_orders() -> None:
    orders = {
        tuple(stream(100, 100, 3, seed, client)[start : start + 100])
        for seed in (0, 1)
        for client in ("ann", "bob", "ann ")
        for start in (0, 100, 200)
    }

    assert len(orders) == 2 * 3 * 3


def test_drawing_does_not_touch_the_global_generator() -> None:
    np.random.seed(3)
    expected = np.random.random()

    np.random.seed(3)
    draw_examples(10, 4, 0, 0, "ann")

    assert np.random.random() == expected


rates = st.floats(1e-8, 1)


@given(high=rates, share=st.floats(0, 1), rounds=st.integers(1, 500))
def test_cosine_falls_from_the_initial_to_the_minimal_rate(
    high: float, share: float, rounds: int
) -> None:
    low = high * share
    training = TrainingConfig(learning_rate=high, min_learning_rate=low)

    over_rounds = [cosine_learning_rate(training, r, rounds) for r in range(1, rounds + 2)]

    assert over_rounds[0] == pytest.approx(high, rel=1e-12)
    assert over_rounds[-1] == pytest.approx(low, rel=1e-9)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(over_rounds))


def test_cosine_of_a_published_run() -> None:
    """5e-5 to 1e-6 over 200 rounds, at a quarter, a half and three quarters of the way."""
    training = TrainingConfig(learning_rate=5e-5, min_learning_rate=1e-6)

    rates = [cosine_learning_rate(training, server_round, 200) for server_round in (51, 101, 151)]

    root = math.sqrt(0.5)
    expected = [1e-6 + 4.9e-5 * share for share in ((1 + root) / 2, 0.5, (1 - root) / 2)]
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("training", "num_examples", "steps"),
    [
        (TrainingConfig(max_steps=10), 3, 10),
        (TrainingConfig(max_steps=-1, num_epochs=1, batch_size=16), 160, 10),
        (TrainingConfig(max_steps=-1, num_epochs=1, batch_size=16), 161, 11),
        (TrainingConfig(max_steps=-1, num_epochs=0.5, batch_size=16), 160, 5),
        (TrainingConfig(max_steps=-1, num_epochs=0.01, batch_size=16), 160, 1),
        (
            TrainingConfig(max_steps=-1, num_epochs=3, batch_size=4, gradient_accumulation_steps=2),
            100,
            38,
        ),
    ],
)
def test_steps_per_round(training: TrainingConfig, num_examples: int, steps: int) -> None:
    assert steps_per_round(training, num_examples) == steps


@pytest.mark.parametrize(
    ("sample_clients", "fraction", "num_clients", "sampled"),
    [
        (None, 0.4, 10, 4),
        (None, 0.01, 10, 1),
        (None, 1.0, 7, 7),
        (None, 0.26, 10, 3),
        (2, 0.4, 20, 2),
        (5, 0.4, 3, 3),
    ],
)
def test_num_sampled(
    sample_clients: int | None, fraction: float, num_clients: int, sampled: int
) -> None:
    federation = FederationConfig(sample_clients=sample_clients, sample_fraction=fraction)
    config = Config(federation=federation)

    assert num_sampled(config, num_clients) == sampled
    everybody = replace(config, algorithm=AlgorithmConfig(participation="all"))
    assert num_sampled(everybody, num_clients) == num_clients
