"""A round of a deployment: seconds except for training, and bytes on each site's socket.

    python benchmarks/bench_deployment.py out.json [--sites 2] [--rounds 8]
        [--communication int8 ...] [--downlink whole int8 ...]

A server and its sites use TLS on loopback, resident trainers and one optimizer step per round. Each
site connects through a proxy that counts bytes. Bytes per round are computed from the difference
between a run of `--rounds` rounds and one of two, which excludes the start, and are compared with
the bytes of tensors in `metrics.jsonl`. Seconds per round exclude the slowest site's training.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from fedllm_flwr.reporting.text import markdown_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

# The tests' helpers start the federation.
from deployments import Federation, rounds_of, running_federation
from processes import wait_for
from slow_link import SlowLink, slow_link

SITES = ("banking", "energy", "health", "retail", "transport")
SHORT = 2  # rounds of the run that is subtracted


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--sites", type=int, default=2, choices=range(2, len(SITES) + 1))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--communication", nargs="+", default=["bfloat16", "int8", "top_k"])
    parser.add_argument("--downlink", nargs="+", default=["whole"])
    asked = parser.parse_args()
    links: list[SlowLink] = []

    @contextmanager
    def counting(port: int) -> Iterator[int]:
        with slow_link(port, round_trip_s=0.0, bits_per_s=1e12) as link:
            links.append(link)
            yield link.port

    rows = []
    names = SITES[: asked.sites]
    with (
        tempfile.TemporaryDirectory() as folder,
        running_federation(Path(folder), dict.fromkeys(names), counting) as federation,
    ):
        assert wait_for(lambda: federation.nodes() == ["online"] * len(names), 120)
        for communication, downlink in itertools.product(asked.communication, asked.downlink):
            options = (f"communication={communication}", f"communication.downlink={downlink}")
            start = measure(federation, links, options, SHORT, len(names))
            whole = measure(federation, links, options, SHORT + asked.rounds, len(names))
            rows.append(
                {
                    "communication": communication,
                    "downlink": downlink,
                    "seconds_beside_training": whole["seconds"],
                    **{
                        way: (whole[way] - start[way]) / asked.rounds / len(names)
                        for way in ("up", "down")
                    },
                    "tensors_up": whole["tensors_up"] / len(names),
                    "tensors_down": whole["tensors_down"] / len(names),
                }
            )
            asked.out.write_text(json.dumps(rows, indent=1))
    header = ["communication", "downlink", "round beside training", "up: socket", "tensors"]
    lines = [[*header, "down: socket", "tensors"]]
    for row in rows:
        numbers = [f"{row[k] / 1e3:.0f} kB" for k in ("up", "tensors_up", "down", "tensors_down")]
        chosen = [row["communication"], row["downlink"]]
        lines.append([*chosen, f"{row['seconds_beside_training']:.1f} s", *numbers])
    print(markdown_table(lines))


def measure(
    federation: Federation, links: list[SlowLink], options: tuple[str, ...], rounds: int, sites: int
) -> dict[str, Any]:
    """Bytes on the sockets of a run, and medians over its rounds."""
    before = {way: sum(link.num_bytes[way] for link in links) for way in ("up", "down")}
    output = Path(tempfile.mkdtemp(dir=federation.folder.parent)) / "run"
    done = federation.run(
        *("fedllm", "server", "run", str(federation.folder), f"output_dir={output}"),
        *(f"federation.num_clients={sites}", f"federation.num_rounds={rounds}"),
        *(*options, "federation.sample_fraction=1.0"),
        *("training.max_steps=1", "evaluation.every=0", "tracking.figures=false"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = rounds_of(output)[1:]
    return {
        **{way: sum(link.num_bytes[way] for link in links) - before[way] for way in before},
        "seconds": median(
            r["seconds"] - max(client["seconds"] for client in r["clients"].values())
            for r in records
        ),
        "tensors_up": median(r["bytes_up"] for r in records),
        "tensors_down": median(r["bytes_down"] for r in records),
    }


if __name__ == "__main__":
    main()
