"""Digests of the adapters that short runs end with, to hold a refactoring against.

    python -m scripts.golden_digests before.json [--engines inprocess,ray]
    ... the refactoring ...
    python -m scripts.golden_digests after.json --against before.json

Runs every algorithm with every task on the embedded data for two rounds, and one resumed run, with
the command ``fedllm`` as a user would. Digests hold for one machine: other CPUs round differently.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ALGORITHMS = ("fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam")
BASELINES = {"local": (), "centralized": ("federation.num_clients=1", "partition=iid")}
SHORT = ("federation.num_rounds=2", "evaluation.every=0", "tracking.figures=false")


def digest_of(run: Path) -> str:
    """SHA-256 over the tensors of the adapters that a run has left, in the order of their paths."""
    digest = hashlib.sha256()
    for file in sorted(run.glob("adapter*/**/adapter_model.safetensors")):
        if "best" not in file.relative_to(run).parts[0]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def fedllm_run(*overrides: str) -> None:
    """Run ``fedllm run``; ends the program if it fails."""
    command = [sys.executable, "-c", "from fedllm_flwr.{} import main; raise SystemExit(main())"]
    package = "commands.main" if (_PACKAGE / "commands").is_dir() else "cli"
    command[2] = command[2].format(package)
    done = subprocess.run([*command, "run", "-q", *overrides], check=False)
    if done.returncode:
        raise SystemExit(f"fedllm run {' '.join(overrides)}: exit status {done.returncode}")


def measure(engines: list[str], tasks: list[str], seen: dict[str, str]) -> dict[str, str]:
    """Digest by name of a run; prints each when it is there, and whether it is that of `seen`."""
    digests: dict[str, str] = {}

    def note(name: str, run: Path) -> None:
        digests[name] = digest_of(run)
        verdict = {None: "", digests[name]: "  same"}.get(seen.get(name), "  DIFFERS")
        print(f"{name:34}{digests[name][:16]}{verdict}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        for engine in engines:
            for task in tasks:
                for algorithm in (*ALGORITHMS, *BASELINES):
                    name = f"{engine} {task} {algorithm}"
                    run = Path(temporary) / name.replace(" ", "-")
                    also = BASELINES.get(algorithm, ())
                    fedllm_run(
                        f"task={task}",
                        f"algorithm={algorithm}",
                        f"federation.engine={engine}",
                        f"output_dir={run}",
                        *SHORT,
                        *also,
                    )
                    note(name, run)
            run = Path(temporary) / f"resumed-{engine}"
            common = (*SHORT, f"federation.engine={engine}")
            fedllm_run("algorithm=scaffold", f"output_dir={run}", *common)
            fedllm_run(f"resume={run}", "federation.num_rounds=3")
            note(f"{engine} resumed scaffold", run)
    return digests


_PACKAGE = Path(__file__).parents[1] / "src" / "fedllm_flwr"


def main() -> None:
    """Measure, write, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--engines", default="inprocess,ray")
    parser.add_argument("--tasks", default="sft,dpo")
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    seen = json.loads(arguments.against.read_text("utf-8")) if arguments.against else {}
    digests = measure(arguments.engines.split(","), arguments.tasks.split(","), seen)
    arguments.output.write_text(json.dumps(digests, indent=1) + "\n", "utf-8")
    if wrong := [name for name, digest in digests.items() if seen.get(name, digest) != digest]:
        raise SystemExit(f"{len(wrong)} of {len(digests)} differ: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
