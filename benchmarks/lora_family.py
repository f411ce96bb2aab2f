"""Algorithms on LoRA's factors with equal work: a search of the learning rate, then seeds.

    python benchmarks/lora_family.py out.json [--rates 0.002 0.005 0.0125] [--seeds 3] [--rules ...]
        [key=value ...]

Each rule is run with the same grid of learning rates and the first seed; the rate with the lowest
loss on the clients' validation records is then run with the other seeds. The test records are
scored at the end of each run and not used for the selection, which is based on the personal
adapters for fedsa and ditto, and on the global one for others. `out.json` stores finished runs;
runs are executed in sequence, the searches first.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedllm_flwr.config.compose import compose
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.files import write_atomically
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.reporting.metrics import read_metrics
from fedllm_flwr.reporting.personal import own_records_rows
from fedllm_flwr.reporting.text import markdown_table
from fedllm_flwr.server.run import run_simulation

RULES = (
    *("fedavg", "ffa", "rolora", "lora_fair", "fedex", "flexlora", "hetlora", "flora"),
    *("fed_sb", "fedsa", "ditto"),
)


def main() -> None:
    """Execute the runs that the file does not contain yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.002, 0.005, 0.0125])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--most", type=int, default=1000, help="runs, of those that are missing")
    parser.add_argument("--table", action="store_true", help="print the tables, and run nothing")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_intermixed_args()
    found: dict[str, Any] = {"command": shlex.join(sys.argv), "runs": {}}
    if asked.out.exists():
        found = json.loads(asked.out.read_text())
    if not asked.table:
        for rate in asked.rates:
            for rule in asked.rules:
                carry_out(rule, rate, 0, asked, found)
        for seed in range(1, asked.seeds):
            for rule in asked.rules:
                if asked.most > 0:
                    carry_out(rule, chosen_rate(rule, found), seed, asked, found)
    print(tables(found))


def carry_out(
    rule: str, rate: float, seed: int, asked: argparse.Namespace, found: dict[str, Any]
) -> None:
    """Execute one run, unless the file contains it."""
    if (name := f"{rule} {rate:g} {seed}") not in found["runs"] and asked.most > 0:
        asked.most -= 1
        found["runs"][name] = scores(rule, rate, seed, asked.overrides)
        write_atomically(asked.out, json.dumps(found, indent=1).encode())
        print(name, json.dumps(found["runs"][name]["own"]), flush=True)


def scores(rule: str, rate: float, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run's scores on the test records and the clients' own, and its cost."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose(
            [
                *overrides,
                *(f"algorithm={rule}", f"seed={seed}", f"training.learning_rate={rate}"),
                *(f"training.min_learning_rate={rate / 100}", "federation.engine=inprocess"),
                *("evaluation.clients=true", "evaluation.every=0", "tracking.figures=false"),
                *("tracking.report=false", f"output_dir={folder}/run"),
            ]
        )
        run_simulation(config, Console(quiet=True), 0.0)
        records = read_metrics(Path(folder, "run", "metrics.jsonl"))
    rows = own_records_rows(records)
    label = ""
    own: dict[str, dict[str, float]] = {}
    for title, values in rows:
        label = label if title.startswith(" ") else title.split(",")[0]
        own[f"{label} {title.split()[0] if title.startswith(' ') else 'mean'}"] = values
    errors = [e for record in records if (e := record.get("aggregation_error")) is not None]
    return {
        "test": records[-1]["eval"],
        "base": records[0]["eval"],
        "own": own,
        "personal": find_rule(config.algorithm).personal is not None,
        "bytes_up": sum(record.get("bytes_up", 0) for record in records),
        "bytes_down": sum(record.get("bytes_down", 0) for record in records),
        "aggregation_error": fmean(errors) if errors else None,
        "steps": sum(c["steps"] for r in records for c in r.get("clients", {}).values()),
        "seconds": sum(c["seconds"] for r in records for c in r.get("clients", {}).values()),
    }


def chosen_rate(rule: str, found: dict[str, Any]) -> float:
    """The rate with the lowest loss on the clients' own held-out records, for the first seed."""
    losses = {}
    for name, run in found["runs"].items():
        own_rule, rate, seed = name.split()
        if own_rule == rule and seed == "0":
            losses[float(rate)] = run["own"]["personal mean" if run["personal"] else "global mean"][
                "loss"
            ]
    return min(losses, key=lambda rate: (losses[rate], rate))


def tables(found: dict[str, Any]) -> str:
    """Tables for the test records and the clients' own: mean ± standard deviation over seeds."""
    rules = list(dict.fromkeys(name.split()[0] for name in found["runs"]))
    first = [["", "rate", "loss", "accuracy", "macro F1", "MB up", "MB down", "BA error", "seeds"]]
    second = [["on the clients' own records", "mean loss", "worst", "best"]]
    for rule in rules:
        rate = chosen_rate(rule, found)
        runs = [r for name, r in found["runs"].items() if name.split()[:2] == [rule, f"{rate:g}"]]
        scores = [
            spread([r["test"][key] for r in runs]) for key in ("loss", "accuracy", "macro_f1")
        ]
        sizes = [f"{fmean(r[f'bytes_{way}'] for r in runs) / 1e6:.2f}" for way in ("up", "down")]
        errors = [r["aggregation_error"] for r in runs]
        error = "-" if None in errors else "0" if max(errors) < 1e-6 else f"{fmean(errors):.3f}"
        first.append([rule, f"{rate:g}", *scores, *sizes, error, str(len(runs))])
        for label in ("global", "personal"):
            if all(f"{label} mean" in r["own"] for r in runs):
                ends = [
                    spread([r["own"][f"{label} {end}"]["loss"] for r in runs])
                    for end in ("mean", "worst", "best")
                ]
                second.append([f"{rule}: {label}", *ends])
    return f"{markdown_table(first)}\n\n{markdown_table(second)}"


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()
