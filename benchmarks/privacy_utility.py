"""The utility cost of privacy: epsilon 2, 8 and infinity, per record and per client.

    python benchmarks/privacy_utility.py out.json [--seeds 3] [--data FOLDER]

Executes the runs that out.json does not contain yet, most important first, and prints the table.
FOLDER has a base model (models/base7m) and financial news (sft/finance_sentiment_train.jsonl,
eval/fpb_test.jsonl); without it, only the demo is run.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev

from fedllm_flwr.config.compose import compose
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.reporting.metrics import read_metrics
from fedllm_flwr.server.run import run_simulation

EPSILONS = ("inf", "8", "2")  # inf: plain training without clipping
COMMON = [
    *("federation.engine=inprocess", "evaluation.every=0", "tracking.figures=false"),
    *("tracking.report=false", "partition=iid"),
]
SETTINGS = {
    "demo per record": ["federation.num_clients=4", "federation.sample_fraction=1.0"],
    "base7m per record": [
        *("model=custom", "data=fingpt", "data.eval_max_samples=200", "training.max_length=256"),
        *("federation.num_clients=3", "federation.sample_fraction=1.0"),
    ],
    "demo per client": [
        *("federation.num_clients=500", "federation.sample_clients=150"),
        *("federation.num_rounds=10", "training.max_steps=1", "training.batch_size=5"),
    ],
}
# Settings found by hand with seed 0. Noise has the same size in every coordinate of the sum, so a
# private run trains few values (B at rank 4), uses large batches, and steps along the sum (SGD):
# AdamW divides each coordinate by its magnitude and thus amplifies noise.
PLAIN = {
    "demo per record": [
        *("federation.num_rounds=8", "training.max_steps=4", "training.batch_size=48"),
    ],
    "base7m per record": [
        *("federation.num_rounds=12", "training.max_steps=10", "training.batch_size=16"),
        *("training.learning_rate=2.0e-3", "training.min_learning_rate=2.0e-4"),
        *("lora.r=16", "lora.alpha=32", "lora.target_modules=all-linear"),
    ],
}
SMALL_AND_STEADY = [
    *("algorithm=ffa", "lora.r=4", "lora.alpha=8", "lora.target_modules=all-linear"),
    *("training.optimizer=sgd", "training.max_grad_norm=0", "training.min_learning_rate=1.0"),
]
PRIVATE = {
    "demo per record": [
        *SMALL_AND_STEADY,
        *("federation.num_rounds=40", "training.max_steps=1", "training.batch_size=96"),
        "training.learning_rate=6.0",
    ],
    "base7m per record": [
        *SMALL_AND_STEADY,
        *("federation.num_rounds=16", "training.max_steps=4", "training.batch_size=32"),
        "training.learning_rate=4.0",
    ],
}


def main() -> None:
    """Execute the runs that the file does not contain yet, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for seed in range(arguments.seeds):
        for setting in arguments.settings:
            for epsilon in EPSILONS:
                name = f"{setting}, epsilon {epsilon}, seed {seed}"
                is_done = name in found or (setting.startswith("base7m") and not arguments.data)
                if not is_done:
                    found[name] = scores(setting, epsilon, seed, arguments.data)
                    arguments.out.write_text(json.dumps(found, indent=1))
                    print(name, found[name], flush=True)
    print(table(found))


def scores(setting: str, epsilon: str, seed: int, data: Path | None) -> dict[str, float]:
    """Scores on the held-out records before and after a run, and the epsilon spent."""
    with tempfile.TemporaryDirectory() as folder:
        own = (PLAIN if epsilon == "inf" else PRIVATE).get(setting, [])
        overrides = [*COMMON, *SETTINGS[setting], *own, f"seed={seed}", f"output_dir={folder}/run"]
        if setting.startswith("base7m"):
            overrides += [
                f"model.path={data}/models/base7m",
                f"data.path={data}/sft/finance_sentiment_train.jsonl",
                f"data.eval_path={data}/eval/fpb_test.jsonl",
            ]
        if epsilon != "inf":
            unit = setting.split()[-1]
            overrides += [f"privacy.unit={unit}", f"privacy.target_epsilon={epsilon}"]
            overrides += ["privacy.sampling=poisson"] if unit == "client" else []
        run_simulation(compose(overrides), Console(quiet=True), 0.0)
        lines = read_metrics(Path(folder, "run", "metrics.jsonl"))
        return {
            "base_accuracy": lines[0]["eval"]["accuracy"],
            **{key: lines[-1]["eval"][key] for key in ("loss", "accuracy", "macro_f1")},
            **{key: lines[-1][key] for key in ("epsilon", "delta") if key in lines[-1]},
            "seconds": sum(line["seconds"] for line in lines),
        }


def table(found: dict[str, dict[str, float]]) -> str:
    """Scores by setting and epsilon: mean and standard deviation over seeds."""
    columns = ("loss", "accuracy", "macro_f1")
    lines = [
        "| setting | epsilon | seeds | loss | accuracy | macro F1 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for setting in SETTINGS:
        for epsilon in EPSILONS:
            runs = [v for k, v in found.items() if k.startswith(f"{setting}, epsilon {epsilon},")]
            if not runs:
                continue
            cells = []
            for column in columns:
                values = [run[column] for run in runs]
                spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{mean(values):.3f}{spread}")
            lines.append(f"| {setting} | {epsilon} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
