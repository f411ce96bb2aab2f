"""Learning rate and examples of a round of local training. NumPy only."""

import math

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.config.schema import TrainingConfig
from fedllm_flwr.params import derive_seed


def cosine_learning_rate(training: TrainingConfig, server_round: int, num_rounds: int) -> float:
    """Local learning rate of a round (from 1): half a cosine from the initial to the minimum.

    lr_r = lr_min + (lr - lr_min) (1 + cos(pi (r - 1) / R)) / 2, constant within the round (the
    schedule of OpenFedLLM). R is ``training.schedule_rounds``, or the number of all rounds if it is
    null; after round R the rate stays at its minimum.
    """
    num_rounds = training.schedule_rounds or num_rounds
    place = min(1.0, (server_round - 1) / num_rounds)
    low, high = training.min_learning_rate, training.learning_rate
    return low + (high - low) * (1 + math.cos(math.pi * place)) / 2


def steps_per_round(training: TrainingConfig, num_examples: int) -> int:
    """Optimizer steps of one client in one round."""
    if training.max_steps > 0:
        return training.max_steps
    per_step = training.batch_size * training.gradient_accumulation_steps
    return max(1, math.ceil(num_examples * training.num_epochs / per_step))


def draw_examples(
    num_examples: int, count: int, updates: int, seed: int, client: str
) -> NDArray[np.int64]:
    """Indices of the `count` examples that a client trains on in a round.

    The client's data is an endless stream of shuffled epochs. Each of its accepted `updates` has
    consumed one window of `count` examples, and the round reads the next window. Rounds in which
    the client is not sampled, or whose reply is lost, do not advance the stream: the accepted
    updates contain no example twice before all examples were seen.
    """
    start = updates * count
    positions = np.arange(start, start + count)
    drawn = np.empty(count, dtype=np.int64)
    for epoch in np.unique(positions // num_examples):
        shuffled = np.random.default_rng(
            derive_seed(seed, "examples", client, int(epoch))
        ).permutation(num_examples)
        chosen = positions // num_examples == epoch
        drawn[chosen] = shuffled[positions[chosen] % num_examples]
    return drawn
