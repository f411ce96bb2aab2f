"""Digests and seconds per round under several installed versions of Flower, in turns.

    python benchmarks/bench_flower.py PYTHON PYTHON [--rounds 5] [--repeats 3]

Each PYTHON is that of an environment with this package. Each runs SCAFFOLD on three clients in one
process, in Flower's simulation on Ray, and as three sites over TLS; all have to end in one adapter.
The first round of a run is left out of the medians: it starts actors or trainers.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from fedllm_flwr.data.sources import DEMO
from fedllm_flwr.flower.names import version

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from deployments import rounds_of, running_federation
from processes import BIN, environment, wait_for

SITES = ("banking", "energy", "health")
WAYS = ("one process", "Ray", "three sites")
EACH = 48  # records of a client
ADAPTER = "adapter/adapter_model.safetensors"
COMMON = (
    "algorithm=scaffold training.max_steps=2 training.batch_size=4 evaluation.every=0 data=jsonl "
    f"data.columns.label=output data.eval_path={DEMO / 'test.jsonl'} data.eval_max_samples=20 "
    "federation.sample_fraction=1.0 tracking.figures=false"
).split()
SIMULATED = ["partition=natural", "partition.column=desk", "federation.client_cpus=1"]


def records_of(name: str) -> list[str]:
    """Lines of the demo for one client."""
    lines = (DEMO / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    return [line for line in lines if json.loads(line)["desk"] == name][:EACH]


def simulate(root: Path, engine: str, rounds: int) -> Path:
    """A finished run of ``fedllm run``."""
    output, together = root / engine, root / "together.jsonl"
    together.write_text("".join(line for name in SITES for line in records_of(name)), "utf-8")
    overrides = [*COMMON, *SIMULATED, f"data.path={together}", f"federation.engine={engine}"]
    own = [f"federation.num_rounds={rounds}", f"output_dir={output}"]
    subprocess.run(
        [str(BIN / "fedllm"), "run", *overrides, *own],
        env=environment(root),
        check=True,
        capture_output=True,
    )
    return output


def deploy(root: Path, rounds: int) -> Path:
    """A finished run of three sites, each with a resident trainer."""
    output = root / "sites"
    own = ["data.path=at-the-sites", "federation.num_clients=3", f"output_dir={output}"]
    sites = {name: records_of(name) for name in SITES}
    with running_federation(root / "federation", sites) as running:
        if not wait_for(lambda: running.nodes() == ["online"] * 3, 180):
            raise SystemExit("the sites are not online")
        overrides = [*COMMON, *own, f"federation.num_rounds={rounds}"]
        done = running.run("fedllm", "server", "run", str(running.folder), *overrides)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
    return output


def measure(rounds: int) -> dict[str, Any]:
    """Digest of the adapter and seconds of the rounds but the first, by way, under this Flower."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "federation").mkdir()
        outputs = simulate(root, "inprocess", rounds), simulate(root, "ray", rounds)
        return {
            way: (
                hashlib.sha256((output / ADAPTER).read_bytes()).hexdigest(),
                [record["seconds"] for record in rounds_of(output)[2:]],
            )
            for way, output in zip(WAYS, (*outputs, deploy(root, rounds)), strict=True)
        }


def main() -> None:
    """Print a table of digests and medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", nargs="*", type=Path, help="of each environment")
    parser.add_argument("--rounds", type=int, default=5, help="of a run; the first is left out")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    arguments = parser.parse_args()
    own = f"--rounds={arguments.rounds}"
    if not arguments.python:  # one turn of one of them
        print(json.dumps({"flower": version(), **measure(arguments.rounds)}))
        return
    found: dict[tuple[str, str], list[tuple[str, list[float]]]] = {}
    for _ in range(arguments.repeats):
        for python in arguments.python:
            path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
            turn = subprocess.run(
                [str(python), __file__, own],
                env={**os.environ, "PATH": path},
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            answer = json.loads(turn.stdout.splitlines()[-1])
            for way in WAYS:
                found.setdefault((way, answer["flower"]), []).append(answer[way])
    print("| way | Flower | adapter (SHA-256) | seconds per round, median | rounds |")
    print("|---|---|---|---|---|")
    for (way, flower), turns in sorted(found.items()):
        [digest] = {digest for digest, _ in turns}
        seconds = [value for _, values in turns for value in values]
        print(f"| {way} | {flower} | {digest[:16]} | {median(seconds):.2f} | {len(seconds)} |")


if __name__ == "__main__":
    main()
