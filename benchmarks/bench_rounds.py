"""Seconds of a round of a deployment, with a new process per message or with a resident trainer.

    python benchmarks/bench_rounds.py WORKLOAD [--rounds 4] [--repeats 2] [--work NAME ...]

Two deployments on loopback, each with a server and one site, are started with the scripts of
`fedllm server init` and `fedllm site init`; they differ only in the site's `resident`. Runs of the
same work alternate between them, so other load affects both: use the ratios instead of the absolute
numbers. The first round of a run starts the trainer and is left out.

Work: `empty` is one step of one example on the embedded model, `embedded` ten steps of sixteen on
it, `workload` the same on the model and the data of WORKLOAD, a directory with `make_model.py`,
which writes a model into the directory it is given, and `sft.json`.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fedllm_flwr.commands.status.health import addresses, check_health
from fedllm_flwr.data.sources import DEMO
from fedllm_flwr.deployment.server_directory import init_server
from fedllm_flwr.deployment.site_directory import SiteOptions, init_site

LIMIT_S = 1800.0  # per run
MODES = {"process per message": False, "resident trainer": True}
COMMON = [
    "federation.engine=deployment",
    "federation.num_clients=1",
    "federation.start_timeout_s=600",
    "evaluation.central=false",
    "data=jsonl",
    "data.path=theirs",
]


@dataclass(frozen=True)
class Federation:
    """A running server with one site."""

    server: Path
    environment: dict[str, str]

    def rounds(self, overrides: list[str], output: Path) -> list[dict[str, Any]]:
        """The round records of a run without the first."""
        text = " ".join([*COMMON, *overrides, f"output_dir={output}"])
        command = ["flwr", "run", str(self.server / "app"), "federation", "--run-config"]
        program = Path(sys.executable).parent / command[0]
        subprocess.run(
            [str(program), *command[1:], f'overrides="{text}"'],
            env=self.environment,
            check=True,
            capture_output=True,
        )
        deadline = time.monotonic() + LIMIT_S
        while not (output / "summary.json").exists():
            if time.monotonic() > deadline:
                raise SystemExit(f"{output}: not finished in {LIMIT_S:g} s")
            time.sleep(0.5)
        lines = (output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines][2:]


def five_free_ports(start: int) -> int:
    """The first of five consecutive free ports from `start` on."""
    for base in range(start, 60_000, 5):
        with ExitStack() as stack:
            try:
                for port in range(base, base + 5):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return base
    raise SystemExit("no five free ports in a row")


@contextmanager
def federation(
    root: Path, data: Path, model: Path | None, resident: bool, start: int
) -> Iterator[Federation]:
    """A server and its site, in `root`."""
    base = five_free_ports(start)
    init_server(root / "server", ["localhost"], base, insecure=True)
    options = SiteOptions(
        "site",
        str(data),
        f"localhost:{base + 1}",
        model_path=None if model is None else str(model),
        device="cpu",
        insecure=True,
        health_port=five_free_ports(base + 10),
    )
    init_site(root / "site", options)
    node = root / "site" / "node.toml"
    node.write_text(f"resident = {str(resident).lower()}\n{node.read_text()}")
    environment = {**os.environ, "FLWR_HOME": str(root / "server" / "flwr"), "OMP_NUM_THREADS": "1"}
    scripts = [root / "server" / "start.sh", root / "site" / "start-supernode.sh"]
    started = []
    with (root / "log").open("w") as log:
        for script in scripts:
            started.append(
                subprocess.Popen(
                    [str(script)],
                    stdout=log,
                    stderr=log,
                    env={**environment, "MAX_RETRIES": "100"},
                    start_new_session=True,
                )
            )
    try:
        _wait_until_it_serves(addresses(root / "server")["superlink"])
        yield Federation(root / "server", environment)
    finally:
        for process in reversed(started):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def _wait_until_it_serves(address: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while (health := check_health("superlink", address)).problem:
        if time.monotonic() > deadline:
            raise SystemExit(health.line)
        time.sleep(0.5)


def work(root: Path, workload: Path) -> dict[str, tuple[Path, Path | None, list[str]]]:
    """Data, the site's model and overrides, by name."""
    model = root / "model"
    subprocess.run([sys.executable, str(workload / "make_model.py"), str(model)], check=True)
    ten = ["training.max_steps=10", "training.batch_size=16"]
    demo, records = root / "demo.jsonl", root / "sft.json"
    shutil.copy(DEMO / "train.jsonl", demo)
    shutil.copy(workload / "sft.json", records)
    return {
        "empty": (demo, None, ["training.max_steps=1", "training.batch_size=1"]),
        "embedded": (demo, None, ten),
        "workload": (records, model, [f"model=custom model.path={model}", *ten]),
    }


def measure(
    root: Path, name: str, job: tuple[Path, Path | None, list[str]], rounds: int, repeats: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of a round and of its training, by mode; runs alternate."""
    data, model, overrides = job
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with ExitStack() as stack:
        federations = {
            mode: stack.enter_context(
                federation(root / name / str(resident), data, model, resident, 23_000 + 500 * i)
            )
            for i, (mode, resident) in enumerate(MODES.items())
        }
        for repeat in range(repeats):
            for mode, running in federations.items():
                output = root / name / f"{MODES[mode]}-{repeat}"
                asked = [*overrides, f"federation.num_rounds={rounds}"]
                found[mode] += running.rounds(asked, output)
    return {
        mode: (
            median(record["seconds"] for record in records),
            median(record["clients"]["site"]["seconds"] for record in records),
        )
        for mode, records in found.items()
    }


def main() -> None:
    """Print a table of the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--rounds", type=int, default=4, help="of a run; the first is left out")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind")
    parser.add_argument("--work", nargs="+", default=["empty", "embedded", "workload"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        print("| work | process per message, s | resident, s | ratio | training in it, s |")
        print("|---|---|---|---|---|", flush=True)
        jobs = work(root, arguments.workload)
        for name in arguments.work:
            both = measure(root, name, jobs[name], arguments.rounds, arguments.repeats)
            (fresh, training), (resident, kept) = both.values()
            ratio = f"{fresh / resident:.1f}"
            times = f"{training:.1f}, {kept:.1f}"
            print(f"| {name} | {fresh:.1f} | {resident:.1f} | {ratio} | {times} |", flush=True)


if __name__ == "__main__":
    main()
