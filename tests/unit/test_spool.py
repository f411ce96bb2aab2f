"""Updates of a round in a temporary file, and the memory of a server that needs all of them."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fedllm_flwr.config.compose import compose
from fedllm_flwr.federation import spool as module
from fedllm_flwr.federation.channel import Reply
from fedllm_flwr.federation.messages import ClientInfo, Update
from fedllm_flwr.federation.recorder import Recorder
from fedllm_flwr.federation.roster import Client
from fedllm_flwr.federation.rounds import Rounds
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.federation.spool import Spool
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Params

WIDTH, LAYERS, RANK = 2048, 96, 2


@pytest.mark.parametrize("in_memory", [2**20, 1])
def test_tensors_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch, in_memory: int) -> None:
    monkeypatch.setattr(module, "_IN_MEMORY", in_memory)
    spool, kept, given = Spool(), [], []
    for i in range(3):
        values = np.random.default_rng(i).normal(size=(4, 6))
        params = {"a": values.astype(np.float32), "b": values.T, "c": np.zeros((0, 2)), "d": values}
        given.append(params)
        kept.append(spool.keep(params))
    for params, found in reversed(list(zip(given, kept, strict=True))):
        assert list(found) == list(params)
        for name in reversed(params):
            assert found[name].dtype == params[name].dtype
            np.testing.assert_array_equal(found[name], params[name])


def adapter(seed: int) -> Params:
    generator = np.random.default_rng(seed)
    shapes = {"lora_A": (RANK, WIDTH), "lora_B": (WIDTH, RANK)}
    return {
        f"h.{layer}.q.{factor}.weight": generator.normal(size=shape).astype(np.float32) / WIDTH
        for layer in range(LAYERS)
        for factor, shape in shapes.items()
    }


SIZE = sum(value.nbytes for value in adapter(0).values())


def peak(tmp_path: Path, clients: int, *overrides: str) -> float:
    """Memory of a round's replies and server step, in adapters; an update itself is one of them."""
    number = f"federation.num_clients={clients}"
    config = compose([number, "partition=iid", f"lora.r={RANK}", *overrides])
    rounds = Rounds(find_rule(config.algorithm), config, Recorder(), tmp_path)
    roster = {f"{i:02d}": Client(i, ClientInfo(f"{i:02d}", 9, "0")) for i in range(clients)}
    state = rounds.begin(ServerState(0, adapter(99)), roster)
    opened = rounds.open(state, roster, 1)
    tracemalloc.start()
    for i, name in enumerate(opened.assignments):
        opened.take(Reply(name, Update(adapter(i), 9, {"loss": 1.0})))
    opened.next_state()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(opened.report.metrics) == clients
    return most / SIZE


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm=fedavg", "evaluation.aggregation_error=false"],
        ["algorithm=fedavg", "evaluation.aggregation_error=true"],
        ["algorithm=fedavg", "evaluation.contribution=leave_one_out"],
        ["algorithm=flexlora"],
        ["algorithm=hetlora"],
        ["algorithm=lora_fair"],
    ],
    ids=" ".join,
)
def test_no_server_step_holds_the_updates_of_a_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: list[str]
) -> None:
    """Three for the sums, one for the update in hand; beyond, one module of all clients."""
    monkeypatch.setattr(module, "_IN_MEMORY", 1)
    assert peak(tmp_path, 12, "federation.sample_fraction=1.0", *overrides) < 6
