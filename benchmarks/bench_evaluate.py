"""A likelihood suite compared with bare batched forward passes over the same tokens."""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import ModelConfig
from fedllm_flwr.data.templates import Segment
from fedllm_flwr.data.tokens import tokenise
from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.evaluation.suites.catalogue import chosen_tasks
from fedllm_flwr.evaluation.suites.harness import HarnessTasks
from fedllm_flwr.evaluation.suites.options import RunOptions
from fedllm_flwr.evaluation.suites.suite_model import TextModel
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.models.inputs import by_length, forward, left_padded


class Recording(TextModel):
    """Stores the prompts that it scores."""

    def log_likelihoods(self, prompts, answers):  # type: ignore[no-untyped-def]
        self.asked = list(prompts)
        return super().log_likelihoods(prompts, answers)


@torch.inference_mode()
def bare(model: TextModel, tokens: list[np.ndarray]) -> None:
    """Only the last logits of the prompts, in padded batches sorted by length."""
    adapted = model.adapted
    lengths = np.array([len(row) for row in tokens], np.int64)
    for batch in by_length(lengths, model.batch_tokens):
        padded, mask = left_padded([tokens[index] for index in batch], adapted)
        forward(
            adapted,
            input_ids=padded,
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=1,
        ).logits.float().log_softmax(-1)
    if adapted.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="directory or hub id of the base model, or embedded")
    parser.add_argument("data_root", type=Path, help="folder with the tasks' local files")
    parser.add_argument("--task", default="fpb")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    prepare_environment()
    torch.set_num_threads(options.threads)
    task = chosen_tasks([options.task])[0]
    name = "tiny" if options.model == "embedded" else "custom"
    adapted = load_model(Config(model=ModelConfig(name=name, path=options.model)))
    model = Recording(adapted)
    asked = RunOptions(limit=options.limit, data_root=options.data_root)
    harness = HarnessTasks()
    with adapted.peft.disable_adapter():
        harness.run(task, model, asked)  # data, imports
        rows = [[Segment(prompt, False)] for prompt in model.asked]
        tokens = [row[-model.max_length + 8 :] for row, _ in tokenise(rows, adapted.tokenizer)]
        seconds: dict[str, list[float]] = {"suite": [], "bare": []}
        for _ in range(options.repeats):
            for kind, work in (
                ("suite", lambda: harness.run(task, model, asked)),
                ("bare", lambda: bare(model, tokens)),
            ):
                started = time.perf_counter()
                work()
                seconds[kind].append(time.perf_counter() - started)
    count = sum(len(row) for row in tokens)
    ratios = [s / b for s, b in zip(seconds["suite"], seconds["bare"], strict=True)]
    print(f"{options.task}: {len(tokens)} prompts, {count} tokens")
    for kind, values in seconds.items():
        print(f"  {kind:<6} {count / statistics.median(values):9.0f} tokens/s")
    print(f"  suite / bare: {statistics.median(ratios):.2f} (median of {options.repeats})")


if __name__ == "__main__":
    main()
