"""Every combiner against every attack on the demo: accuracy and backdoor success.

    python benchmarks/robustness.py out.json [--seeds 0 1 2] [--rounds 8] [key=value ...]
        [--attacks none sign_flip ...] [--combiners mean krum,robust.average=1 ...]

All ten clients take part in each round, and three of them attack. The file stores finished runs, so
an interrupted call can be resumed, and seeds can be added.
"""

import argparse
import json
import tempfile
from pathlib import Path

from fedllm_flwr.config.compose import compose
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.reporting.metrics import read_metrics
from fedllm_flwr.server.run import run_simulation

COMBINERS = (
    *("mean", "median", "trimmed_mean", "krum"),
    *("geometric_median", "norm_bound", "centred_clip"),
)
ATTACKS = ("none", "sign_flip", "scale", "gaussian", "alie", "label_flip", "backdoor")


def main() -> None:
    """Execute the runs that the file does not contain yet, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--attacks", nargs="+", default=ATTACKS)
    parser.add_argument("--combiners", nargs="+", default=COMBINERS)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    setting = {"rounds": arguments.rounds, "overrides": arguments.overrides}
    if kept.setdefault("setting", setting) != setting:
        parser.error(f"{arguments.out} holds runs of another setting: {kept['setting']}")
    found = kept.setdefault("scores", {})
    for seed in arguments.seeds:
        for attack in arguments.attacks:
            for combiner in arguments.combiners:
                name = f"{combiner} {attack} {seed}"
                if name not in found:
                    found[name] = scores(combiner, attack, seed, arguments)
                    arguments.out.write_text(json.dumps(kept, indent=1) + "\n")
                    print(name, found[name], flush=True)
    print(table(found))


def scores(
    combiner: str, attack: str, seed: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """The final scores on the held-out records."""
    combiner, *settings = combiner.split(",")
    with tempfile.TemporaryDirectory() as folder:
        config = compose(
            [
                *(f"attack={attack}", f"algorithm.combiner={combiner}", f"seed={seed}", *settings),
                *("federation.engine=inprocess", "federation.sample_fraction=1.0"),
                *(f"federation.num_rounds={arguments.rounds}", "evaluation.every=0"),
                *("tracking.figures=false", f"output_dir={folder}/run"),
                *arguments.overrides,
            ]
        )
        run_simulation(config, Console(quiet=True), 0.0)
        final = read_metrics(Path(folder, "run", "metrics.jsonl"))[-1]["eval"]
        return {key: final[key] for key in ("loss", "accuracy", "attack_success") if key in final}


def table(found: dict[str, dict[str, float]]) -> str:
    """Accuracy by combiner and attack over seeds, and the success of backdoors."""
    combiners = dict.fromkeys(name.split()[0] for name in found)
    lines = ["| combiner | " + " | ".join(ATTACKS) + " |", "|---" * (1 + len(ATTACKS)) + "|"]
    for combiner in combiners:
        cells = [f"`{combiner}`"]
        for attack in ATTACKS:
            each = [v for k, v in found.items() if k.split()[:2] == [combiner, attack]]
            cell = spread([v["accuracy"] for v in each]) if each else "-"
            if each and "attack_success" in each[0]:
                cell += f" ({spread([v['attack_success'] for v in each])})"
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """The mean and, for several values, the maximum deviation from it."""
    mean = sum(values) / len(values)
    furthest = max(abs(value - mean) for value in values)
    return f"{mean:.2f}" + (f" ± {furthest:.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
