"""Time and memory of a server's work in a round: combining updates, and the server step.

    python benchmarks/bench_server_step.py [--clients 50] [--values 14] [--rank 8] [RULE ...]

The adapter has square layers of width 4096 with about ``--values`` million values in total (as for
a 7 B model), and the updates of ``--clients`` clients are random. Each rule runs in a separate
process; with one thread, its CPU seconds do not depend on other load. Use the ratios to FedAvg:
time and memory grow in proportion to the number of layers for all rules. ``fedavg`` is without the
aggregation error, ``fedavg+error`` with it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from fedllm_flwr.config.compose import compose
from fedllm_flwr.factors import core_of
from fedllm_flwr.federation.channel import Reply
from fedllm_flwr.federation.messages import ClientInfo, Update
from fedllm_flwr.federation.recorder import Recorder
from fedllm_flwr.federation.roster import Client
from fedllm_flwr.federation.rounds import Rounds
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Params

WIDTH = 4096
ROUND = 3  # the first rounds of fed_sb only estimate gradients
RULES = (
    *("fedavg", "fedavg+error", "ffa", "rolora", "lora_fair", "fedex", "flexlora", "hetlora"),
    *("flora", "fedsa", "fed_sb", "ditto"),
)


def adapter(layers: int, rank: int, seed: int, scale: float) -> Params:
    """Random factors in float32."""
    generator = np.random.default_rng(seed)
    shapes = {"lora_A": (rank, WIDTH), "lora_B": (WIDTH, rank)}
    return {
        f"h.{layer}.q.{factor}.weight": scale * generator.standard_normal(shape, np.float32)
        for layer in range(layers)
        for factor, shape in shapes.items()
    }


def measure(name: str, clients: int, layers: int, rank: int) -> dict[str, float]:
    """CPU seconds, and additional bytes of memory of the round."""
    rule_name, _, error = name.partition("+")
    wanted = "true" if error else "false"
    config = compose(
        [
            f"algorithm={rule_name}",
            f"evaluation.aggregation_error={wanted}",
            f"federation.num_clients={clients}",
            "federation.sample_fraction=1.0",
            "partition=iid",
            f"lora.r={rank}",
        ]
    )
    rounds = Rounds(find_rule(config.algorithm), config, Recorder(), Path())
    names = [f"client-{i:02d}" for i in range(clients)]
    roster = {n: Client(i, ClientInfo(n, 100, "0")) for i, n in enumerate(names)}
    start = adapter(layers, rank, 99, 0.02)
    if rounds.rule.has_cores:  # they start from a base model
        start = {n: 0 * v if "lora_B" in n else v for n, v in start.items()}
    state = rounds.begin(ServerState(ROUND - 1, start), roster)
    opened = rounds.open(state, roster, ROUND)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = 0.0
    for i, client in enumerate(names):
        delta = adapter(layers, rank, i, 0.002)
        delta |= {core_of(n): v[:rank] for n, v in delta.items() if "lora_B" in n}
        delta = {n: delta[n] for n in rounds.shared(state.params, ROUND)}
        started = time.process_time()
        opened.take(Reply(client, Update(delta, 100, {"loss": 1.0})))
        seconds += time.process_time() - started
        del delta  # the next one is drawn without it
    assert not opened.report.failures, opened.report.failures
    started = time.process_time()
    opened.next_state()
    seconds += time.process_time() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "bytes": 1024.0 * grown}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rules", nargs="*", default=RULES)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--values", type=float, default=14.0, help="million")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--one", action="store_true", help="measure one rule in this process")
    options = parser.parse_args()
    layers = round(options.values * 1e6 / (2 * WIDTH * options.rank))
    if options.one:
        print(json.dumps(measure(options.rules[0], options.clients, layers, options.rank)))
        return
    found = {}
    sizes = [f"--clients={options.clients}", f"--values={options.values}", f"--rank={options.rank}"]
    for rule in options.rules:
        command = [sys.executable, __file__, rule, "--one", *sizes]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[rule] = json.loads(done.stdout.splitlines()[-1])
        first = found[options.rules[0]]
        ratios = [found[rule][key] / first[key] for key in ("seconds", "bytes")]
        print(
            f"| {rule} | {found[rule]['seconds']:.1f} s | {ratios[0]:.2f} | "
            f"{found[rule]['bytes'] / 2**30:.2f} GB | {ratios[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
