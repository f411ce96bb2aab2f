"""Size and loading time of the report of a large run, by default 500 rounds with 50 clients.

    python benchmarks/bench_report.py [--rounds 500] [--clients 50] [--output report.html]

The records are synthetic. The time is from the start of the navigation to the end of the load
event, with all charts drawn, in a headless Chromium, if one is installed.
"""

import argparse
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from fedllm_flwr.config.compose import compose
from fedllm_flwr.reporting.html.render import render
from fedllm_flwr.reporting.html.run import RunFacts, run_page

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import CHROMIUM, Browser

_LOADED = "performance.timing.loadEventEnd - performance.timing.navigationStart"


def made_up_records(rounds: int, clients: int) -> list[dict[str, Any]]:
    """Records in a run's format, with half of the clients in each round."""
    draw = random.Random(0)
    names = [f"hospital-{i:02d}" for i in range(clients)]
    records: list[dict[str, Any]] = [{"round": 0, "seconds": 0.0, "eval": scores(2.5, draw)}]
    for number in range(1, rounds + 1):
        loss = 0.4 + 2 * math.exp(-number / 60)
        some = sorted(draw.sample(names, clients // 2))
        records.append(
            {
                "round": number,
                "learning_rate": 1e-3 * (1 + math.cos(math.pi * number / rounds)) / 2,
                "loss": loss,
                "clients": {n: {**scores(loss, draw), "num_examples": 160} for n in some},
                "failures": {} if number % 9 else {some[0]: "no reply within 60 s"},
                "seconds": 3.0 + draw.random(),
                "bytes_up": 10**6 * len(some),
                "bytes_down": 10**6 * len(some),
                "eval": scores(loss, draw),
                "client_eval": {"loss": loss, "clients": {n: scores(loss, draw) for n in names}},
            }
        )
    return records


def scores(loss: float, draw: random.Random) -> dict[str, float]:
    noisy = loss * draw.uniform(0.9, 1.1)
    return {"loss": noisy, "accuracy": math.exp(-noisy), "token_accuracy": math.exp(-noisy / 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    records = made_up_records(asked.rounds, asked.clients)
    config = compose([f"federation.num_rounds={asked.rounds}"])
    started = time.perf_counter()
    page = render(run_page(RunFacts("made-up", config, records)))
    print(f"written in {time.perf_counter() - started:.2f} s, {len(page.encode()):,} bytes")
    with tempfile.TemporaryDirectory() as folder:
        file = asked.output or Path(folder) / "report.html"
        file.write_text(page, encoding="utf-8")
        if not CHROMIUM:
            print("no Chromium here: loading time not measured")
            return
        with Browser(Path(folder) / "profile") as browser:
            seconds = []
            for _ in range(asked.repeats):
                browser.open(file.resolve().as_uri())
                seconds.append(browser.wait(_LOADED) / 1000)
    print(f"loaded in {median(seconds):.2f} s (median of {asked.repeats})")


if __name__ == "__main__":
    main()
