"""Start-up, rounds and memory of a simulation by number of clients.

    python benchmarks/bench_scale.py [--clients 10 100 1000 10000] [--engines ray inprocess]

Every run trains 4 clients per round for one step on the same short records of one file, so only the
number of clients differs. Start-up is the time from the command to the start of the first round;
memory is the peak of the server's process (with ``inprocess``, including the clients). Runs are
repeated ``--repeats`` times, alternating; medians are printed, with ratios to the smallest number
of clients.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--engines", nargs="+", default=["ray", "inprocess"])
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "records.jsonl")
        rows = ({"q": f"What is {i} plus one?", "a": str(i + 1)} for i in range(arguments.records))
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        measure("inprocess", 10, 1, data, Path(folder, "warm"))  # tokens, byte code, file cache
        for engine in arguments.engines:
            each: dict[int, list[dict[str, float]]] = {}
            for turn in range(arguments.repeats):
                for clients in arguments.clients:
                    output = Path(folder, f"{engine}-{clients}-{turn}")
                    one = measure(engine, clients, arguments.rounds, data, output)
                    each.setdefault(clients, []).append(one)
            found[engine] = {
                str(clients): {key: median(one[key] for one in some) for key in some[0]}
                for clients, some in each.items()
            }
    print(
        "| engine | clients | start-up | round | whole | memory |\n|---|---:|---:|---:|---:|---:|"
    )
    for engine, table in found.items():
        base = next(iter(table.values()))
        for clients, one in table.items():
            print(
                f"| {engine} | {int(clients):,} | {_cell(one, base, 'start-up', 's')} | "
                f"{_cell(one, base, 'round', 's')} | {_cell(one, base, 'whole', 's')} | "
                f"{_cell(one, base, 'MB', 'MB')} |"
            )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(engine: str, clients: int, rounds: int, data: Path, output: Path) -> dict[str, float]:
    """Seconds and megabytes of one run."""
    overrides = [
        *(f"federation.engine={engine}", f"federation.num_clients={clients}"),
        *("partition=iid", "federation.sample_clients=4", f"federation.num_rounds={rounds}"),
        *("data=jsonl", f"data.path={data}", "data.columns.instruction=q"),
        *("data.columns.output=a", "training.max_steps=1", "training.batch_size=4"),
        *("evaluation.every=0", "tracking.figures=false", f"output_dir={output}"),
    ]
    started = time.monotonic()
    program = [sys.executable, "-m", "fedllm_flwr.commands.main", "run", *overrides]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    whole = time.monotonic() - started
    if status:
        sys.exit(f"{' '.join(program)} ended with {os.waitstatus_to_exitcode(status)}")
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    phases = json.loads((output / "summary.json").read_text("utf-8"))["phases"]
    return {
        "start-up": phases["start-up"],
        "round": median(record["seconds"] for record in records[1:]),
        "whole": whole,
        "MB": usage.ru_maxrss / 1024,
    }


def _cell(one: dict[str, float], base: dict[str, float], key: str, unit: str) -> str:
    digits = 0 if unit == "MB" else 1
    return f"{one[key]:.{digits}f} {unit} ({one[key] / base[key]:.2f} x)"


if __name__ == "__main__":
    main()
