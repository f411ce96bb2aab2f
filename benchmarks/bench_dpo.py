"""A round of DPO with stored reference log-probabilities or with those computed in every step.

    python benchmarks/bench_dpo.py [--repeats 5] [--steps 10] [--threads 1]

The embedded model and pairs, 16 pairs per step. Three programs train the same adapter on the same
micro-batches: the package's `train_dpo` with values stored by an earlier round; the same with a
forward pass of the reference in every micro-batch, like a trainer without precomputed values; and
the package's first round, which computes the values of its pairs once, sorted by length, before
training. They alternate in one process, so other load affects all of them: use the ratios instead
of the absolute numbers.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.tasks import find

prepare_environment()

# Set the environment before importing the libraries that read it.
# ruff: noqa: E402
import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback

from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import compose
from fedllm_flwr.data.client_data import simulated_data
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.models.device import micro_batch_size, torch_threads
from fedllm_flwr.tasks.dpo.pairs import EncodedPairs
from fedllm_flwr.tasks.dpo.training import train_dpo
from fedllm_flwr.tasks.preferences.reference import LogProbs, reference_log_probs
from fedllm_flwr.training.batches import RoundBatches, round_batches
from fedllm_flwr.training.schedule import draw_examples

LEARNING_RATE = 5e-4
KEPT, FIRST, EVERY_STEP = "kept values", "first round", "in every step"  # names of the programs


@dataclass(frozen=True)
class Workload:
    """The model, the pairs and the training settings."""

    config: Config
    model: AdaptedModel
    pairs: EncodedPairs
    kept: LogProbs  # (pairs, 2)

    def train(
        self, batches: RoundBatches, reference: LogProbs, callbacks: list[TrainerCallback]
    ) -> float:
        """Train one round; return its mean loss."""
        config = self.config
        return train_dpo(
            self.model,
            self.pairs,
            reference,
            batches,
            config.dpo,
            config.training,
            LEARNING_RATE,
            0,
            callbacks,
        ).loss


def load_workload(steps: int, threads: int) -> Workload:
    """The embedded model and all its training pairs."""
    config = compose(["task=dpo", f"training.max_steps={steps}"])
    model = load_model(config)
    pairs = simulated_data(config, find("dpo").records, model.tokenizer).encoded
    assert isinstance(pairs, EncodedPairs)
    with torch_threads(threads):
        kept = reference_log_probs(model, None, pairs.rows, config.evaluation.batch_tokens)
    return Workload(config, model, pairs, kept.reshape(-1, 2))


class _ReferenceInEveryStep(TrainerCallback):
    """Computes and checks the values of each micro-batch before it is trained on."""

    def __init__(self, work: Workload, batches: RoundBatches) -> None:
        self._work = work
        self._left = iter(batches.batches)

    def _compute(self) -> None:
        batch = np.array(next(self._left))
        rows = self._work.pairs.take(batch).rows
        fresh = reference_log_probs(self._work.model, None, rows, batch_tokens=10**9)
        np.testing.assert_allclose(fresh.reshape(-1, 2), self._work.kept[batch], rtol=1e-4)
        self._work.model.peft.train()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first micro-batch of a step."""
        self._compute()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before each further micro-batch."""
        self._compute()


def programs(
    work: Workload, drawn: NDArray[np.int64]
) -> dict[str, Callable[[RoundBatches], float]]:
    """The programs to compare."""

    def first(batches: RoundBatches) -> float:
        values, chosen = np.zeros_like(work.kept), np.unique(drawn)
        budget = work.config.evaluation.batch_tokens
        rows = work.pairs.take(chosen).rows
        values[chosen] = reference_log_probs(work.model, None, rows, budget).reshape(-1, 2)
        return work.train(batches, values, [])

    return {
        KEPT: lambda batches: work.train(batches, work.kept, []),
        FIRST: first,
        EVERY_STEP: lambda batches: work.train(
            batches, work.kept, [_ReferenceInEveryStep(work, batches)]
        ),
    }


def measure(work: Workload, repeats: int) -> dict[str, list[float]]:
    """Seconds per step of each program and repeat; every repeat samples other pairs."""
    training = work.config.training
    size = micro_batch_size(training, work.model.device, work.model.num_base_parameters, rows=2)
    seconds: dict[str, list[float]] = {KEPT: [], FIRST: [], EVERY_STEP: []}
    names = list(seconds)
    for repeat in range(repeats + 1):  # the first one warms up
        count = training.max_steps * training.batch_size
        drawn = draw_examples(len(work.pairs), count, repeat + 1, 0, "bench")
        batches = round_batches(drawn, work.pairs.lengths, training.max_steps, size, packed=False)
        run = programs(work, drawn)
        losses = []
        names = [*names[1:], names[0]]
        for name in names:
            work.model.load(work.model.initial)
            started = time.perf_counter()
            losses.append(run[name](batches))
            if repeat:
                seconds[name].append((time.perf_counter() - started) / training.max_steps)
        np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=Path(__file__).stem)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    work = load_workload(options.steps, options.threads)
    with torch_threads(options.threads):
        seconds = measure(work, options.repeats)
    print(f"{'':15} {'ms a step':>10} {'to kept values':>15}")
    for name, values in seconds.items():
        ratio = median(a / b for a, b in zip(values, seconds[KEPT], strict=True))
        print(f"{name:15} {1e3 * median(values):10.0f} {ratio:15.2f}")


if __name__ == "__main__":
    main()
