"""Leakage, utility and epsilon of runs with and without privacy: table and figure.

    python benchmarks/privacy_audit.py out.json [--seeds 3] [--most N] [--figure FILE.png]

Each run trains long on few records with canaries, so that it memorises them, and is attacked by
`fedllm audit`. Executes the runs that out.json does not contain yet, and prints the table.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedllm_flwr.commands.audit import FILE, audit
from fedllm_flwr.config.compose import compose
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.reporting.metrics import read_metrics
from fedllm_flwr.runs.kept_adapters import find_adapter
from fedllm_flwr.server.run import run_simulation

LEVELS = {
    "none": [],
    "record, epsilon 8": ["privacy.unit=record", "privacy.target_epsilon=8"],
    "record, epsilon 2": ["privacy.unit=record", "privacy.target_epsilon=2"],
}
RUN = [
    *("federation.engine=inprocess", "partition=iid", "federation.num_clients=3"),
    *("federation.sample_fraction=1.0", "federation.num_rounds=4", "data.max_samples=120"),
    *("privacy.canaries=100", "privacy.delta=1e-5", "training.max_steps=25"),
    *("training.batch_size=16", "training.learning_rate=1e-2", "lora.dropout=0"),
    *("evaluation.every=0", "tracking.figures=false", "tracking.report=false"),
]
RECORDS = 600  # maximum number of members and of non-members
Found = dict[str, Any]
COLUMNS: dict[str, Callable[[Found], float]] = {
    "epsilon": lambda f: f["audit"]["spent"]["epsilon"] if f["audit"]["spent"] else np.inf,
    "accuracy": lambda f: f["eval"]["accuracy"],
    "membership AUC": lambda f: f["audit"]["attacks"]["loss"]["auc"]["value"],
    "base model's AUC": lambda f: f["audit"]["attacks"]["base"]["auc"]["value"],
    "exposure, bits": lambda f: f["audit"]["canaries"]["exposure"]["value"],
    "canary AUC": lambda f: f["audit"]["canaries"]["auc"]["value"],
    "epsilon above": lambda f: f["audit"]["canaries"]["epsilon_above"],
    "tokens of 1 record": lambda f: f["audit"]["updates"]["one"]["own"]["value"],
    "tokens of a batch": lambda f: f["audit"]["updates"]["batch"]["own"]["value"],
}


def main() -> None:
    """Run and audit what the file does not contain yet; print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most", type=int, default=1000, help="runs in this call")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    before = len(found)
    for seed in range(arguments.seeds):
        for level in LEVELS:
            name = f"{level}, seed {seed}"
            if name not in found and len(found) - before < arguments.most:
                found[name] = audited(level, seed)
                arguments.out.write_text(json.dumps(found, indent=1))
                print(name, flush=True)
    print(table(found))
    if arguments.figure:
        draw(found, arguments.figure)


def audited(level: str, seed: int) -> Found:
    """One run's final scores and its audit."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        config = compose([*RUN, *LEVELS[level], f"seed={seed}", f"output_dir={run}"])
        run_simulation(config, Console(quiet=True), 0.0)
        list(audit(find_adapter(str(run)), run, RECORDS))
        last = read_metrics(run / "metrics.jsonl")[-1]
        return {"eval": last["eval"], "audit": json.loads((run / FILE).read_text())}


def each(found: Found, level: str, column: str) -> list[float]:
    """A column's values over seeds."""
    runs = [value for name, value in found.items() if name.startswith(f"{level}, seed")]
    return [COLUMNS[column](run) for run in runs]


def table(found: Found) -> str:
    """Mean, lowest and highest value over seeds."""
    lines = [f"| privacy | {' | '.join(COLUMNS)} |", "|---" + "|---:" * len(COLUMNS) + "|"]
    for level in LEVELS:
        cells = []
        if not each(found, level, "accuracy"):
            continue
        for column in COLUMNS:
            values = each(found, level, column)
            spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3g}{spread}")
        lines.append(f"| {level} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Found, path: Path) -> None:
    """Plot utility and leakage by epsilon; bars show the range over seeds."""
    import matplotlib.pyplot as plt

    panels = {
        "accuracy": None,
        "membership AUC": 0.5,
        "exposure, bits": 1.44,
        "tokens of 1 record": None,
    }
    labels = dict(zip(LEVELS, ("no\nprivacy", "epsilon\n8", "epsilon\n2"), strict=True))
    levels = {level: labels[level] for level in LEVELS if each(found, level, "accuracy")}
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 2.6), layout="constrained")
    for axis, (column, guessing) in zip(axes, panels.items(), strict=True):
        values = [each(found, level, column) for level in levels]
        means = np.array([np.mean(v) for v in values])
        low, high = (np.array([f(v) for v in values]) for f in (min, max))
        axis.bar(range(len(levels)), means, yerr=[means - low, high - means], color="#4477aa")
        if guessing is not None:
            axis.axhline(guessing, color="black", linestyle=":", linewidth=1)
        axis.set_xticks(range(len(levels)), list(levels.values()))
        axis.set_title(column, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
