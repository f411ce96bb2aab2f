"""Every algorithm on the tiny model: what clients send, recomputed naively, is the new adapter."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message

from fedllm_flwr.federation.messages import Update
from fedllm_flwr.federation.tensor_files import load_params
from fedllm_flwr.federation.wire import unpack_assignment, unpack_update
from fedllm_flwr.runs.directory import RunDirectory
from tiny_runs import ADAPTER, ALGORITHMS, NUM_CLIENTS, WrappedApp, outcome, run_intercepted

VARIANTS = ("paper", pytest.param("openfedllm", marks=pytest.mark.slow))
Vector = np.ndarray

# The papers' and OpenFedLLM's published settings, by algorithm: eta, beta1, beta2, tau.
SETTINGS = {
    "fedavgm": (1.0, 0.9, 0.0, 0.0),
    "fedadagrad": (1e-3, 0.0, 0.0, 1e-3),
    "fedyogi": (1e-3, 0.9, 0.99, 1e-3),
    "fedadam": (1e-3, 0.9, 0.99, 1e-3),
}


class Recorder(WrappedApp):
    """The real client app; keeps the clients' updates by round."""

    def __init__(self) -> None:
        super().__init__(after=self._record)
        self.updates: dict[int, list[tuple[int, Update]]] = {}

    def _record(self, message: Message, context: Context, reply: Message) -> Message:
        assert message.metadata.message_type == "train"  # no client is asked who it is
        server_round = unpack_assignment(message.content).round
        update = unpack_update(reply.content)
        self.updates.setdefault(server_round, []).append((context.node_id, update))
        return reply


def sizes(directory: RunDirectory) -> dict[int, int]:
    """Records by node, as the run's table of clients has them."""
    with directory.clients.open(encoding="utf-8") as file:
        return {i: int(row["examples"]) for i, row in enumerate(csv.DictReader(file), start=1)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_adapter_follows_from_the_updates(algorithm: str, variant: str, tmp_path: Path) -> None:
    recorder = Recorder()
    directory = run_intercepted(
        tmp_path / "run",
        recorder,
        f"algorithm={algorithm}",
        f"algorithm.variant={variant}",
        "checkpoint.keep=10",
    )
    states = [load_params(path)[0] for path in sorted(directory.checkpoints.iterdir())]
    server = NaiveServer(algorithm, variant, flat(states[0]["params"]))
    for server_round in (1, 2):
        updates = recorder.updates[server_round]
        assert len(updates) == 2
        assert any(np.abs(flat(update.delta)).max() > 1e-4 for _, update in updates)
        server.step(weighted_mean(algorithm, variant, updates, sizes(directory)))
        found = flat(states[server_round]["params"])
        np.testing.assert_allclose(found, server.w, rtol=1e-6, atol=1e-7)
        server.w = found.astype(np.float64)  # as the next round starts: in float32
    if algorithm == "scaffold":
        check_control(states[2]["state.control"], recorder, directory.client_states)


class NaiveServer:
    """The update rules, written anew from the papers and from OpenFedLLM's aggregation."""

    def __init__(self, algorithm: str, variant: str, w: Vector) -> None:
        self.algorithm, self.paper = algorithm, variant == "paper"
        self.eta, self.beta1, self.beta2, self.tau = SETTINGS.get(algorithm, (1.0, 0.0, 0.0, 0.0))
        self.w = w.astype(np.float64)
        self.m: Vector | None = None
        self.v = np.full(w.shape, self.tau**2)

    def step(self, d: Vector) -> None:
        if self.algorithm not in SETTINGS:
            self.w = self.w + d
            return
        self.m = self._momentum(d)
        if self.algorithm == "fedavgm":
            self.w = self.w + self.eta * self.m
            return
        square = (d if self.paper else self.m) ** 2
        if self.algorithm == "fedadagrad":
            self.v = self.v + square
        elif self.algorithm == "fedyogi":
            self.v = self.v - (1 - self.beta2) * square * np.sign(self.v - square)
        else:
            self.v = self.beta2 * self.v + (1 - self.beta2) * square
        self.w = self.w + self.eta * self.m / (np.sqrt(self.v) + self.tau)

    def _momentum(self, d: Vector) -> Vector:
        before = np.zeros_like(d) if self.m is None else self.m
        if self.paper and self.algorithm == "fedavgm":
            return self.beta1 * before + d
        if not self.paper and (self.m is None or self.algorithm == "fedadagrad"):
            return d
        return self.beta1 * before + (1 - self.beta1) * d


def weighted_mean(
    algorithm: str, variant: str, updates: list[tuple[int, Update]], sizes: dict[int, int]
) -> Vector:
    if (variant == "paper" and algorithm == "scaffold") or (
        variant == "openfedllm" and algorithm in ("fedadagrad", "fedyogi", "fedadam")
    ):
        weights = [1.0 for _ in updates]
    else:
        weights = [float(sizes[node_id]) for node_id, _ in updates]
    deltas = [flat(update.delta).astype(np.float64) for _, update in updates]
    return np.sum([w * d for w, d in zip(weights, deltas, strict=True)], axis=0) / sum(weights)


def check_control(control: dict[str, Vector], recorder: Recorder, states: Path) -> None:
    """SCAFFOLD: c is the mean of all clients' c_i, and moved by what the clients sent."""
    own = np.zeros(flat(control).shape)
    for folder in states.iterdir():
        own += flat(load_params(max(folder.glob("round-*")))[0]["control"])
    np.testing.assert_allclose(flat(control), own / NUM_CLIENTS, atol=1e-6)
    sent = np.zeros_like(own)
    for updates in recorder.updates.values():
        for _, update in updates:
            sent += flat(update.contributed["control_delta"])
    np.testing.assert_allclose(flat(control), sent / NUM_CLIENTS, atol=1e-6)
    assert np.abs(flat(control)).max() > 0


def flat(params: dict[str, Vector]) -> Vector:
    return np.concatenate([params[name].ravel() for name in sorted(params)])


@pytest.mark.parametrize(
    "algorithm",
    [
        "fedavg",
        "scaffold",
        pytest.param("fedprox", marks=pytest.mark.slow),
        pytest.param("fedavgm", marks=pytest.mark.slow),
    ],
)
def test_held_out_loss_falls(algorithm: str, whole_run: Callable[..., Path]) -> None:
    import json

    summary = json.loads((whole_run(f"algorithm={algorithm}") / "summary.json").read_text())
    assert summary["final"]["loss"] < summary["base"]["loss"]


def test_one_client_is_centralised_training(whole_run: Callable[..., Path]) -> None:
    """FedAvg over one client that holds all the data; the central loop itself: parity/."""
    alone = ("federation.num_clients=1", "federation.sample_clients=1")
    federated = outcome(whole_run("algorithm=fedavg", *alone))
    central = outcome(whole_run("algorithm=centralized", *alone))
    assert federated == central


def test_proximal_term_combines_with_a_server_optimizer(whole_run: Callable[..., Path]) -> None:
    plain = outcome(whole_run("algorithm=fedadam"))
    proximal = outcome(whole_run("algorithm=fedadam", "algorithm.mu=10"))
    assert proximal[ADAPTER] != plain[ADAPTER]
    zero = outcome(whole_run("algorithm=fedprox", "algorithm.mu=0"))
    assert zero == outcome(whole_run("algorithm=fedavg"))


def test_local_clients_are_never_aggregated(whole_run: Callable[..., Path]) -> None:
    path = whole_run("algorithm=local", "checkpoint.keep=10")
    start, *later = (load_params(file)[0]["params"] for file in sorted(path.glob("checkpoints/*")))
    for params in later:
        np.testing.assert_array_equal(flat(params), flat(start))
    # Each client's second round went on from its first: the loss it starts from is lower.
    log = outcome(path)["metrics"]
    for name in (f"client-{i}" for i in range(NUM_CLIENTS)):
        assert log[2]["clients"][name]["loss"] < log[1]["clients"][name]["loss"]


def test_equal_runs_are_equal_and_another_seed_differs(whole_run: Callable[..., Path]) -> None:
    first = outcome(whole_run("algorithm=fedavg"))
    assert outcome(whole_run("algorithm=fedavg", "seed=0")) == first
    assert outcome(whole_run("algorithm=fedavg", "seed=1"))[ADAPTER] != first[ADAPTER]
