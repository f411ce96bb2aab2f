"""Local training on one GPU at 1B, 7B and 8B shapes: the seed's settings against the package's.

    python benchmarks/bench_gpu.py out.json [--shapes 7b 1b] [--minutes 8] [--steps 3]

Weights are random, and so are the records, whose lengths are spread like alpaca's (median 119
tokens, at most 512). Nothing is downloaded. The seed's settings are those of OpenFedLLM: int8,
gradient checkpointing, batches padded to their longest record, and logits of all tokens. Each
program trains a LoRA adapter (r 8 on q_proj and v_proj) on the same 16 records a step. Speed counts
real tokens. MFU counts 4N operations per token (forward, and backward without gradients of the
frozen weights) against --peak TFLOP/s. Rows that do not fit into --minutes are left out and named.
"""

import argparse
import gc
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fedllm_flwr
from benchmarks.bench_training import Workload, bare_loop, ours
from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.schema import ModelConfig
from fedllm_flwr.data.encode import Encoded, flatten
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.adapted_model import ModelCache
from fedllm_flwr.models.device import describe_device, micro_batch_size
from fedllm_flwr.reporting.text import markdown_table
from fedllm_flwr.training.batches import round_batches

TOKENIZER = Path(fedllm_flwr.__file__).parent / "assets" / "tiny"
BATCH, LONGEST = 16, 512
SHAPES = {  # hidden size, layers, heads, key-value heads, MLP, vocabulary
    "tiny": (64, 2, 4, 2, 128, 512),
    "1b": (2048, 16, 32, 8, 8192, 128_256),
    "7b": (4096, 32, 32, 32, 11_008, 32_000),
    "8b": (4096, 32, 32, 8, 14_336, 128_256),
}


@dataclass(frozen=True)
class Program:
    """How to train: a bare loop over padded batches, or the package."""

    name: str
    bare: bool = False
    quantization: str = "none"
    attention: str = "auto"
    kernels: str = "torch"
    checkpointing: bool | None = None
    packed: bool = False


PROGRAMS = [
    Program("seed: int8", bare=True, quantization="int8", attention="eager", checkpointing=True),
    Program("seed: bf16", bare=True, attention="eager", checkpointing=True),
    Program("bf16", attention="sdpa"),
    Program("bf16, packed, sdpa", attention="sdpa", checkpointing=False, packed=True),
    Program("bf16, packed", checkpointing=False, packed=True),
    Program("bf16, packed, flex", attention="flex_attention", checkpointing=False, packed=True),
    Program("bf16, packed, liger", kernels="liger", checkpointing=False, packed=True),
    Program("nf4, packed", quantization="nf4", checkpointing=False, packed=True),
    Program("int8, packed", quantization="int8", checkpointing=False, packed=True),
]


def main() -> None:
    """Run what fits into the time, keep each row at once, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["7b", "1b"])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps that are timed")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of the card in bfloat16")
    options = parser.parse_args()
    started, examples = time.monotonic(), random_examples(BATCH * options.steps)
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        folder = Path(tempfile.mkdtemp(prefix="fedllm-bench-"))
        try:
            write_model(shape, folder)
            for program in PROGRAMS:
                if time.monotonic() - started > 60 * options.minutes:
                    row: dict[str, Any] = {"skipped": "no time left"}
                else:
                    row = measure(program, folder, examples, options.steps, options.peak)
                rows.append({"shape": shape, **asdict(program), **row})
                options.out.write_text(json.dumps(rows, indent=1))
                print(rows[-1], flush=True)
        finally:
            shutil.rmtree(folder)
    print(table(rows))


def random_examples(count: int) -> Encoded:
    """Records of random tokens; the second half of each is the answer."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(119), 0.65, count), 39, LONGEST).astype(int)
    kept = [
        (rng.integers(3, 500, n).astype(np.int32), np.arange(n) >= n // 2) for n in lengths.tolist()
    ]
    return flatten(kept, list(range(count)), count, truncated=0)


def write_model(shape: str, folder: Path) -> None:
    """A Llama with random weights in bfloat16, and the embedded model's tokenizer."""
    hidden, layers, heads, kv_heads, mlp, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in TOKENIZER.glob("*token*"):
        shutil.copy(file, folder)


def measure(
    program: Program, folder: Path, examples: Encoded, steps: int, peak: float
) -> dict[str, Any]:
    """Real tokens per second, MFU and peak memory, or why there are none."""
    config = changed(
        Config(model=ModelConfig(name="bench", path=str(folder))),
        model={"attention": program.attention, "kernels": program.kernels},
        quantization={"name": program.quantization},
        training={
            "max_steps": steps,
            "batch_size": BATCH,
            "gradient_checkpointing": program.checkpointing,
            "micro_batch_size": BATCH if program.bare or program.packed else None,
        },
    )
    cache = ModelCache()
    try:
        model = cache.load(config)
        work = Workload(config, model, examples)
        size = micro_batch_size(config.training, model.device, model.num_base_parameters)
        seconds = []
        if program.bare and program.checkpointing:
            base = model.peft.get_base_model()
            base.gradient_checkpointing_enable({"use_reentrant": False})
        for count in (1, steps):  # the first warms up
            drawn = np.arange(count * BATCH)
            batches = round_batches(drawn, examples.lengths, count, size, program.packed)
            started = time.perf_counter()
            if program.bare:
                bare_loop(work, batches, all_logits=True)
            else:
                ours(work, batches)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    except (ConfigError, torch.OutOfMemoryError) as error:
        return {"skipped": str(error)[:200]}
    else:
        speed = batches.num_tokens / seconds[-1]
        return {
            "device": describe_device(model.device),
            "attention": model.attention,
            "tokens_per_s": round(speed, 1),
            "mfu": round(4 * model.num_base_parameters * speed / (peak * 1e12), 4),
            "computed_per_token": round(batches.computed_tokens / batches.num_tokens, 3),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        }
    finally:
        del cache
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each program: speed, and its ratio to the seed's of the same shape."""
    lines = [["shape", "program", "attention", "real tokens/s", "to the seed", "MFU", "peak GB"]]
    seeds = {r["shape"]: r["tokens_per_s"] for r in rows[::-1] if r["bare"] and "mfu" in r}
    for row in rows:
        if "skipped" in row:
            lines.append([row["shape"], row["name"], row["skipped"], *"----"])
            continue
        ratio = row["tokens_per_s"] / seeds.get(row["shape"], float("nan"))
        numbers = [f"{row['tokens_per_s']:,.0f}", f"{ratio:.2f}", f"{row['mfu']:.1%}"]
        lines.append(
            [row["shape"], row["name"], row["attention"], *numbers, f"{row['peak_gb']:.1f}"]
        )
    return markdown_table(lines)


if __name__ == "__main__":
    main()
