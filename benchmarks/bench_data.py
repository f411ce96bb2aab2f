"""Start-up time and peak memory of a run on one large local file, with a cold and a warm cache.

    python benchmarks/bench_data.py [--megabytes 2000] [--texts FILE ...] [--max-samples N] [--run]

It writes a JSON lines file of records (instruction, input, output), made from the records of
--texts (json or jsonl; default: the embedded demo) with a number in each to make them unique, and
reads it like `fedllm run`, up to every client's encoded examples: first with an empty cache, then
with the cache of the first start. Each measurement is a separate process. --run also measures
`fedllm run` with one round of one step. A process that exceeds --most-gb is killed and reported.
File and cache are in a temporary directory and are removed.
"""

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fedllm_flwr.environment import prepare_environment

CLIENTS = 10
OVERRIDES = [
    "data=jsonl",
    "federation.engine=inprocess",
    f"federation.num_clients={CLIENTS}",
    "federation.num_rounds=1",
    "training.max_steps=1",
]
DEMO = Path(__file__).parents[1] / "src/fedllm_flwr/assets/demo/train.jsonl"


def write_records(file: Path, texts: list[Path], megabytes: float) -> int:
    """Write the records and return their number."""
    records = [record for path in texts for record in read_records(path)]
    chance = random.Random(0)
    size = count = 0
    with file.open("wb") as out:
        while size < megabytes * 1e6:
            record = dict(chance.choice(records))
            record["instruction"] = f"{record['instruction']} ({count})"
            # Answers of consecutive records vary in length and ending.
            record["output"] += f" {chance.choice(records)['output']} {count}"
            size += out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def read_records(path: Path) -> Iterator[dict[str, str]]:
    """The records of a file that have an instruction and an answer."""
    text = path.read_text("utf-8")
    rows = json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
    for row in rows:
        if row.get("instruction") and row.get("output"):
            yield {name: str(row.get(name) or "") for name in ("instruction", "input", "output")}


def read_as_a_run(data: Path, output: Path) -> None:
    """A run's work before its first step; print seconds and peak memory after each phase."""
    prepare_environment()
    from fedllm_flwr.config.compose import compose
    from fedllm_flwr.data.client_data import simulated_client
    from fedllm_flwr.models.tokenizer import load_tokenizer
    from fedllm_flwr.runs.directory import create
    from fedllm_flwr.runs.fit import check_fit
    from fedllm_flwr.server.opening import check_data
    from fedllm_flwr.server.preparation import prepare
    from fedllm_flwr.tasks import task_of

    config = compose([*OVERRIDES, f"data.path={data}", f"output_dir={output}"])
    last = time.monotonic(), time.process_time()

    def report(phase: str) -> None:
        nonlocal last
        now = time.monotonic(), time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"    {phase:<28}{now[0] - last[0]:8.1f} s {now[1] - last[1]:8.1f} s of CPU"
            f"{peak:8.2f} GB at most so far",
            flush=True,
        )
        last = now

    tokenizer = load_tokenizer(config.model)
    report("imports, tokenizer")
    check_fit(config)
    report("fit check (read, encode)")
    check_data(create(config), config)
    report("digests of the records")
    prepare(config)
    report("preparation (overlap, model)")
    kind = task_of(config).records
    clients = (simulated_client(config, kind, tokenizer, i) for i in range(CLIENTS))
    examples = sum(len(client.train) for client in clients)
    report(f"{examples:,} examples")


def measure(command: list[str], environment: dict[str, str], most_gb: float) -> None:
    """Run a command; print its wall time, CPU time and peak memory."""
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        time.sleep(0.2)
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except (OSError, ValueError):
            continue
        if int(fields.get("VmRSS", "0 kB").split()[0]) > most_gb * 2**20:
            process.kill()
            print(f"    ended: more than {most_gb:g} GB after {time.monotonic() - started:.0f} s")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"    in all {time.monotonic() - started:.1f} s; of all measured so far at most "
        f"{used.ru_maxrss / 2**20:.2f} GB, {used.ru_utime + used.ru_stime:.0f} s of CPU",
        flush=True,
    )


def main() -> None:
    """Parse the command line, write the file, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--megabytes", type=float, default=2000)
    parser.add_argument("--texts", type=Path, nargs="+", default=[DEMO])
    parser.add_argument("--max-samples", type=int, help="data.max_samples; without it all")
    parser.add_argument("--run", action="store_true", help="measure `fedllm run`, too")
    parser.add_argument("--most-gb", type=float, default=12)
    parser.add_argument("--folder", type=Path, help="where the temporary directory is made")
    parser.add_argument("--read", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.max_samples:
        OVERRIDES.append(f"data.max_samples={options.max_samples}")
    if options.read:
        read_as_a_run(*options.read)
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-data-") as folder:
        data = Path(folder) / "records.jsonl"
        count = write_records(data, options.texts, options.megabytes)
        print(f"{count:,} records, {data.stat().st_size / 1e6:,.0f} MB", flush=True)
        outputs = (Path(folder) / f"run-{i}" for i in itertools.count())
        limit = ["--max-samples", str(options.max_samples)] if options.max_samples else []
        programs = [[sys.executable, __file__, *limit, "--read", str(data)]]
        if options.run:
            start = "import sys; from fedllm_flwr.commands.main import main; sys.exit(main())"
            command = [sys.executable, "-c", start, "run"]
            programs.append([*command, *OVERRIDES, f"data.path={data}"])
        for program in programs:
            environment = os.environ | {"FEDLLM_CACHE": f"{folder}/cache-{len(program)}"}
            for cache in ("cold", "warm"):
                output = str(next(outputs))
                last = output if "--read" in program else f"output_dir={output}"
                print(f"  {cache} cache, {' '.join(program[:3])}", flush=True)
                measure([*program, last], environment, options.most_gb)


if __name__ == "__main__":
    main()
