"""Local training compared with a bare PyTorch loop and with padded batches, on a fixed workload.

    python benchmarks/bench_training.py WORKLOAD [--repeats 5] [--steps 10] [--threads 2]
        [--profile]

WORKLOAD is a directory with `make_model.py` (writes the model to a given directory) and `sft.json`
(instruction, input, output). Three programs train the same adapter on the same examples: the
package's `train_sft`, a bare loop over the same micro-batches, and a bare loop over padded batches
with all logits, as in a first implementation. They alternate in one process, so other load affects
all of them: use the ratios instead of the absolute numbers. With `--profile`, it instead prints
what one optimizer step of the first and the last spends its time on, the last also with gradient
checkpointing, as OpenFedLLM trains.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.tasks import find

prepare_environment()

# Set the environment before importing the libraries that read it.
# ruff: noqa: E402
import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import (
    ColumnsConfig,
    DataConfig,
    FederationConfig,
    ModelConfig,
    TrainingConfig,
)
from fedllm_flwr.data.encode import Encoded, encode
from fedllm_flwr.data.federated import load_federated_data
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.models.device import micro_batch_size, torch_threads
from fedllm_flwr.models.inputs import collate_padded, needed_logits
from fedllm_flwr.reporting.text import markdown_table
from fedllm_flwr.tasks.sft.training import train_sft
from fedllm_flwr.training.batches import RoundBatches, round_batches, split_step
from fedllm_flwr.training.schedule import draw_examples

LEARNING_RATE = 5e-4
OURS, BARE, PADDED = "train_sft", "bare loop", "bare loop, padded"  # names of the programs
CHECKPOINTED = "padded, checkpointed"
MOST_OPERATIONS = 8  # rows of a profile


@dataclass(frozen=True)
class Workload:
    """The model, one client's encoded records and the training settings."""

    config: Config
    model: AdaptedModel
    examples: Encoded


def load_workload(directory: Path, steps: int, threads: int) -> Workload:
    """The seed's model and data: LoRA r 8 on q_proj and v_proj, 16 examples a step, 512 tokens."""
    with tempfile.TemporaryDirectory() as made:
        command = [sys.executable, str(directory / "make_model.py"), made]
        subprocess.run(command, check=True, capture_output=True)
        config = Config(
            model=ModelConfig(name="bench", path=made),
            data=DataConfig(
                name="bench",
                path=str(directory / "sft.json"),
                columns=ColumnsConfig(label=None),
            ),
            training=TrainingConfig(max_steps=steps),
            federation=FederationConfig(client_cpus=threads),
        )
        model = load_model(config)
    records = load_federated_data(config, find("sft").records).train["messages"][:1000]
    examples = encode(records, model.tokenizer, "alpaca", config.training.max_length)
    return Workload(config, model, examples)


def bare_loop(work: Workload, batches: RoundBatches, all_logits: bool) -> None:
    """AdamW over the micro-batches: only forward, backward, clip and step."""
    model = work.model.peft
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    for start in range(0, len(batches), batches.per_step):
        parts = [
            collate_padded(work.examples, batches[i], work.model.pad_id)
            for i in range(start, start + batches.per_step)
        ]
        count = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        optimizer.zero_grad()
        for part in parts if all_logits else map(needed_logits, parts):
            model(**part, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()


def ours(work: Workload, batches: RoundBatches) -> None:
    """The package's local training."""
    training = work.config.training
    train_sft(work.model, work.examples, batches, training, LEARNING_RATE, 0, [])


def measure(work: Workload, repeats: int, micro_batch_size: int) -> dict[str, list[float]]:
    """Real tokens per second of each program and repeat; every repeat samples other examples."""
    training, lengths = work.config.training, work.examples.lengths
    sizes = {OURS: micro_batch_size, BARE: micro_batch_size, PADDED: training.batch_size}
    speeds: dict[str, list[float]] = {name: [] for name in sizes}
    names = list(sizes)
    for repeat in range(repeats + 1):  # the first one warms up
        count = training.max_steps * training.batch_size
        drawn = draw_examples(len(work.examples), count, repeat + 1, 0, "bench")
        names = [*names[1:], names[0]]
        for name in names:
            work.model.load(work.model.initial)
            started = time.perf_counter()
            batches = round_batches(drawn, lengths, training.max_steps, sizes[name], packed=False)
            if name == OURS:
                ours(work, batches)
            else:
                bare_loop(work, batches, all_logits=name == PADDED)
            if repeat:
                speeds[name].append(batches.num_tokens / (time.perf_counter() - started))
    return speeds


def profiled(work: Workload, micro_batch_size: int) -> dict[str, dict[str, float]]:
    """Seconds of one optimizer step by program and operation of PyTorch, without its callees."""
    training, lengths = work.config.training, work.examples.lengths
    drawn = draw_examples(len(work.examples), training.batch_size, 1, 0, "bench")
    found: dict[str, dict[str, float]] = {}
    for name in (CHECKPOINTED, PADDED, OURS):
        size = micro_batch_size if name == OURS else training.batch_size
        batches = round_batches(drawn, lengths, 1, size, packed=False)
        run = ours if name == OURS else partial(bare_loop, all_logits=True)
        if name == CHECKPOINTED:
            work.model.peft.gradient_checkpointing_enable()
            work.model.peft.enable_input_require_grads()
        for warm in (False, True):
            work.model.load(work.model.initial)
            with profile(activities=[ProfilerActivity.CPU]) if warm else nullcontext() as watched:
                run(work, batches)
        if name == CHECKPOINTED:
            work.model.peft.gradient_checkpointing_disable()
        assert watched is not None
        found[name] = {one.key: one.self_cpu_time_total / 1e6 for one in watched.key_averages()}
    return found


def profile_table(found: dict[str, dict[str, float]]) -> str:
    """The operations that take longest in any program, and the sums."""
    most = sorted(
        {key for spent in found.values() for key in spent},
        key=lambda key: -max(spent.get(key, 0.0) for spent in found.values()),
    )[:MOST_OPERATIONS]
    rows = [[key, *(f"{spent.get(key, 0.0):.2f}" for spent in found.values())] for key in most]
    rest = [sum(spent.values()) - sum(spent.get(k, 0.0) for k in most) for spent in found.values()]
    rows.append(["rest", *(f"{seconds:.2f}" for seconds in rest)])
    rows.append(["sum", *(f"{sum(spent.values()):.2f}" for spent in found.values())])
    return markdown_table([["seconds of one step", *found], *rows])


def padding(work: Workload, size: int) -> float:
    """Computed tokens per real token."""
    training, lengths = work.config.training, work.examples.lengths
    steps = len(lengths) // training.batch_size
    drawn = draw_examples(len(lengths), steps * training.batch_size, 1, 0, "bench")
    batches = round_batches(drawn, lengths, steps, size, packed=False)
    return batches.computed_tokens / batches.num_tokens


def split_milliseconds(lengths: NDArray[np.int64], batch_size: int, micro_batch_size: int) -> float:
    """Time to divide one optimizer step into micro-batches."""
    indices = list(range(batch_size))
    started = time.perf_counter()
    for _ in range(20):
        split_step(indices, lengths, -(-batch_size // micro_batch_size))
    return (time.perf_counter() - started) / 20 * 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="of one step, instead of speeds")
    options = parser.parse_args()
    work = load_workload(options.workload, options.steps, options.threads)
    size = micro_batch_size(work.config.training, work.model.device, work.model.num_base_parameters)
    if options.profile:
        with torch_threads(options.threads):
            print(profile_table(profiled(work, size)))
        return
    with torch_threads(options.threads):
        speeds = measure(work, options.repeats, size)
    print(f"{'':20} {'real tokens/s':>14} {'to bare loop':>13} {'computed/real':>14}")
    for name, values in speeds.items():
        ratio = median(a / b for a, b in zip(values, speeds[BARE], strict=True))
        padded = padding(work, 16 if name == PADDED else size)
        print(f"{name:20} {median(values):14.0f} {ratio:13.2f} {padded:14.2f}")
    for batch_size in (16, 32, 64, 128):
        spent = split_milliseconds(work.examples.lengths, batch_size, size)
        print(f"division of a step of {batch_size} examples: {spent:.2f} ms")


if __name__ == "__main__":
    main()
