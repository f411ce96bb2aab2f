"""Cost of secure aggregation: computing time and bytes, per site and round and at the server.

    python benchmarks/bench_secure.py [--sites 3 10 50] [--millions 1 14]

All sites of a round exist for their keys; one of them masks a vector of the given size, and the
server's work is timed with this vector for all sites (sums and streams do not depend on the
values). A tenth of the sites, at least one, drops out before sending. Times are processor times on
one thread.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from fedllm_flwr.federation.masked_round import code_of
from fedllm_flwr.federation.secure.graph import Session
from fedllm_flwr.federation.secure.keys import new_identity
from fedllm_flwr.federation.secure.server import MaskedSum
from fedllm_flwr.federation.secure.site import SecureSite


def main() -> None:
    """Print a row for each number of sites and of values."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10, 50])
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 14])
    arguments = parser.parse_args()
    print(
        "| sites | values | site: encode + mask | sign + unmask | up, relative to bfloat16 | "
        "up, additional | server |"
    )
    print("|---|---|---|---|---|---|---|")
    for count in arguments.sites:
        for millions in arguments.millions:
            with tempfile.TemporaryDirectory() as folder:
                print(row(count, int(millions * 1e6), Path(folder)), flush=True)


def row(count: int, size: int, folder: Path) -> str:
    """One line of the table."""
    names = [f"site-{i:03}" for i in range(count)]
    sites = {}
    for name in names:
        (folder / f"{name}.key").write_bytes(new_identity())
        sites[name] = SecureSite(
            folder / name, folder / name / "1", "1", name, folder / f"{name}.key"
        )
    cards = {name: site.card() for name, site in sites.items()}
    session = Session("run/1/x", cards, "examples", 1000.0, 1 / 3, 4.0)
    update = {"w": np.random.default_rng(0).normal(0, 1e-2, size).astype(np.float32)}
    started = time.process_time()
    words = code_of(session, size).encode(update, 0.5)
    sealed = sites[names[0]].mask(session, words)
    masking = time.process_time() - started
    beside = sum(map(len, sealed.values()))
    total = MaskedSum(session, size)
    staying = names[: count - max(1, count // 10)]
    small = np.zeros(1, np.uint32)
    for name in staying:
        mine = sealed if name == names[0] else sites[name].mask(session, small.copy())
        if name == names[0]:
            started = time.process_time()
            total.add(name, words, mine)
            adding = time.process_time() - started
        else:
            total.add(name, words, mine)
    lists = total.lists()
    started = time.process_time()
    signed = sites[names[0]].sign(lists[names[0]])
    signing = time.process_time() - started
    total.take(names[0], signed)
    for name in staying[1:]:
        total.take(name, sites[name].sign(lists[name]))
    questions = total.questions()
    started = time.process_time()
    opened = sites[names[0]].unmask(questions[names[0]])
    unmasking = signing + time.process_time() - started
    beside += len(signed.signature) + sum(map(len, opened.shares.values()))
    total.take(names[0], opened)
    for name in staying[1:]:
        total.take(name, sites[name].unmask(questions[name]))
    started = time.process_time()
    total.unmasked()
    server = time.process_time() - started + len(staying) * adding
    cells = [
        *(str(count), f"{size / 1e6:g} M", f"{masking:.2f} s", f"{unmasking * 1e3:.0f} ms"),
        *(f"{(4 * size + beside) / (2 * size):.2f} x", f"{beside / 1e3:.1f} kB", f"{server:.2f} s"),
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
