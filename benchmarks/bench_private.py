"""A DP-SGD step compared with a plain step on the same examples.

    python benchmarks/bench_private.py MODEL DATA [--repeats 6] [--steps 4]

MODEL is a base model's directory, DATA a file with instruction, input and output. Both programs
alternate in one process on one thread, and their CPU seconds are compared, which hardly depend on
other load. Peak memory is measured in a separate process for each program.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from fedllm_flwr.environment import prepare_environment

prepare_environment()

# Set the environment before importing the libraries that read it.
# ruff: noqa: E402
import numpy as np

from fedllm_flwr.config import changed
from fedllm_flwr.config.compose import compose
from fedllm_flwr.data.federated import load_federated_data
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.models.device import micro_batch_size, torch_threads
from fedllm_flwr.tasks import task_of
from fedllm_flwr.tasks.base import LocalWork
from fedllm_flwr.tasks.sft.training import train_sft
from fedllm_flwr.training.batches import RoundBatches, round_batches
from fedllm_flwr.training.private import train_privately

PLAIN, PRIVATE = "plain", "per record"


class Programs:
    """One model, one client's records, and both ways to train on them."""

    def __init__(self, path: str, data: str, steps: int) -> None:
        config = compose(
            [
                *("model=custom", f"model.path={path}", "data=jsonl", f"data.path={data}"),
                *("data.max_samples=2000", f"training.max_steps={steps}"),
                *("training.max_length=256", "training.device=cpu"),
            ]
        )
        self.config = changed(
            config, privacy={"unit": "record", "noise_multiplier": 1.0, "clip": 1.0}
        )
        self.model: AdaptedModel = load_model(config)
        task = task_of(config)
        kind, tokenizer = task.records, self.model.tokenizer
        records = load_federated_data(config, kind).train
        self.examples: Any = kind.codec.encode(
            [(messages,) for messages in records["messages"]],
            *(tokenizer, config.data.template, 256, "right"),
        )
        self.size = micro_batch_size(
            config.training, self.model.device, self.model.num_base_parameters
        )
        every = np.arange(len(self.examples))
        work = LocalWork(
            self.config, self.model, self.examples, every, RoundBatches([], 1, 1, 1, 1), 1.0, 0
        )
        self.losses = task.example_losses(work, {})

    def train(self, program: str, repeat: int) -> float:
        """CPU seconds of a step on 16 examples determined by `repeat`."""
        training = self.config.training
        count = training.max_steps * training.batch_size
        drawn = np.random.default_rng(repeat).integers(len(self.examples), size=count)
        self.model.load(self.model.initial)
        started = time.process_time()
        if program == PLAIN:
            batches = round_batches(
                drawn, self.examples.lengths, training.max_steps, self.size, packed=False
            )
            train_sft(self.model, self.examples, batches, training, 1e-3, 0, [])
        else:
            steps = [part.tolist() for part in np.split(drawn, training.max_steps)]
            by_length = [sorted(s, key=lambda i: int(self.examples.lengths[i])) for s in steps]
            train_privately(
                self.model,
                self.model.trainable(),
                self.losses,
                np.arange(len(self.examples)),
                RoundBatches(by_length, 1, training.batch_size, 1, 1),
                self.config,
                learning_rate=1e-3,
                seed=0,
                rows_per_example=1,
                drops_out=True,
                callbacks=[],
                penalty=lambda: None,
            )
        return (time.process_time() - started) / training.max_steps


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", choices=(PLAIN, PRIVATE), help="print its peak memory")
    options = parser.parse_args()
    programs = Programs(options.model, options.data, options.steps)
    with torch_threads(1):
        if options.only:
            programs.train(options.only, 0)
            print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
            return
        seconds: dict[str, list[float]] = {PLAIN: [], PRIVATE: []}
        for repeat in range(options.repeats + 1):  # the first one warms up
            for name in (PLAIN, PRIVATE) if repeat % 2 else (PRIVATE, PLAIN):
                seconds[name].append(programs.train(name, repeat))
    ratios = [b / a for a, b in zip(seconds[PLAIN][1:], seconds[PRIVATE][1:], strict=True)]
    print(f"ratio {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    for name, values in seconds.items():
        command = [sys.executable, str(Path(__file__)), options.model, options.data]
        command += ["--only", name, "--steps", str(options.steps)]
        peak = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print(f"{name:12} {median(values[1:]):.3f} CPU seconds a step, {peak:.0f} MB at most")


if __name__ == "__main__":
    main()
