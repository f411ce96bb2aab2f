"""Rounds of the strategies through a grid: sampling, sums, state, resume, memory."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict

from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.compose import compose
from fedllm_flwr.config.schema import (
    AlgorithmConfig,
    EvaluationConfig,
)
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Acknowledged, Update
from fedllm_flwr.federation.roster import choose_clients
from fedllm_flwr.federation.state import ServerState, load_state, save_state
from fedllm_flwr.federation.strategies import STRATEGIES
from fedllm_flwr.federation.wire import pack_update, unpack_assignment
from memory_grid import MemoryGrid
from strategy_runs import (
    HYPER,
    NODES,
    SIZES,
    START,
    Listener,
    assert_same_bits,
    config_of,
    honest,
    nodes_of,
    replying,
    roster_of,
    run,
    update_of,
)

USED = {"ant": 5, "bee": 8, "cat": 8}  # of SIZES


@pytest.mark.parametrize("weighting", ["auto", "examples", "used", "uniform"])
def test_fedavg_round_weights_by_data_size_unless_told_otherwise(weighting):
    seen = {}

    def spy(name):
        def handler(message):
            used = USED[name]
            update = update_of(message, name, num_examples=used)
            seen[name] = update.delta
            return Message(pack_update(update, "float32"), reply_to=message)

        return handler

    grid = MemoryGrid({NODES[name]: spy(name) for name in SIZES})
    config = config_of()
    config = changed(config, algorithm={"weighting": weighting})
    state, (report,) = run(config, grid)
    weights = {"used": USED, "uniform": dict.fromkeys(SIZES, 1)}.get(weighting, SIZES)
    for key in START:
        expected = START[key].astype(float)
        for name, delta in seen.items():
            expected = expected + delta[key] * weights[name] / sum(weights.values())
        np.testing.assert_allclose(state.params[key], expected, rtol=1e-6)
        assert state.params[key].dtype == np.float32
    assert report.num_examples == USED
    assert report.failures == {}
    assert report.bytes_down == report.bytes_up == 3 * 10 * 4


def test_scaffold_sends_and_moves_the_server_variate():
    """Two rounds with two of three clients: c is the mean of all three c_i."""
    config = config_of("scaffold", sample_clients=2)
    grid = MemoryGrid(nodes_of())
    state, reports = run(config, grid, rounds=2)
    own = {name: {key: np.zeros_like(value) for key, value in START.items()} for name in SIZES}
    for report in reports:
        assert len(report.metrics) == 2
        for name in report.sampled:
            rng = np.random.default_rng([report.round, *name.encode()])
            for key, value in START.items():
                change = -rng.normal(size=value.shape).astype(np.float32)
                own[name][key] = own[name][key] + change
    for key in START:
        mean = np.mean([own[name][key].astype(np.float64) for name in SIZES], axis=0)
        np.testing.assert_allclose(state.tensors["control"][key], mean, rtol=1e-12, atol=1e-15)
    assert reports[0].bytes_down == 2 * 2 * 10 * 4
    tasks = [unpack_assignment(message.content) for message in grid.sent]
    assert not any(task.config.algorithm.variant == "openfedllm" for task in tasks)
    assert all(value.max() == 0 for value in tasks[0].sent["control"].values())
    assert any(value.any() for value in tasks[-1].sent["control"].values())


def test_openfedllm_scaffold_tells_clients_to_correct_after_the_step():
    grid = MemoryGrid(nodes_of())
    run(config_of("scaffold", variant="openfedllm"), grid)
    assert unpack_assignment(grid.sent[0].content).config.algorithm.variant == "openfedllm"


@pytest.mark.parametrize("name", HYPER)
@pytest.mark.parametrize("variant", ["paper", "openfedllm"])
def test_order_of_replies_changes_no_bit(name, variant):
    config, nodes = config_of(name, variant), nodes_of()
    forward, _ = run(config, MemoryGrid(nodes, order=[101, 102, 103]), rounds=3)
    backward, _ = run(config, MemoryGrid(nodes, order=[103, 102, 101]), rounds=3)
    assert_same_bits(forward, backward)


@pytest.mark.parametrize("name", HYPER)
def test_interrupted_run_continues_bit_identically(name, tmp_path):
    config = config_of(name, sample_clients=2)
    known = tmp_path / "known"
    whole, _ = run(config, MemoryGrid(nodes_of()), rounds=5)
    half, _ = run(config, MemoryGrid(nodes_of()), rounds=2, known=known)
    save_state(tmp_path, half, keep=1)
    loaded, _ = load_state(tmp_path)
    resumed, reports = run(config, MemoryGrid(nodes_of()), rounds=5, state=loaded, known=known)
    assert_same_bits(resumed, whole)
    assert [report.round for report in reports] == [3, 4, 5]


def test_local_keeps_the_start():
    state, _ = run(config_of("local"), MemoryGrid(nodes_of()), rounds=2)
    assert_same_bits(state, ServerState(2, START, clients=state.clients))
    assert set(state.clients.values()) == {Acknowledged(2, 2)}


def test_local_trains_every_client_in_every_round_unless_it_is_sampled():
    chosen = ["federation.engine=inprocess", "federation.sample_clients=1", "algorithm=local"]
    for options, counts in (([], [3, 3, 3]), (["algorithm.participation=sampled"], [1, 1, 1])):
        config = compose([*chosen, *options, "federation.num_clients=3", "partition=iid"])
        _, reports = run(config, MemoryGrid(nodes_of()), rounds=3)
        assert [len(report.metrics) for report in reports] == counts


def test_centralized_takes_exactly_one_client():
    config = Config(algorithm=AlgorithmConfig(name="centralized"))
    with pytest.raises(FederationError, match=r"got 3; set federation.num_clients=1"):
        STRATEGIES["centralized"](config, roster_of(), ServerState(0, START))
    STRATEGIES["centralized"](config, roster_of({"ant": 10}), ServerState(0, START))


def test_sampling_is_seeded_and_covers_all_clients():
    roster = roster_of({f"client-{i}": 10 for i in range(20)})
    config = config_of(sample_clients=4)
    strategies = [
        STRATEGIES["fedavg"](config, dict(reversed(roster.items())), ServerState(0, START)),
        STRATEGIES["fedavg"](config, roster, ServerState(0, START)),
    ]

    def chosen(strategy, server_round):
        return choose_clients(strategy.roster, strategy.config, server_round)

    drawn = [[chosen(s, r) for r in range(1, 60)] for s in strategies]
    assert drawn[0] == drawn[1]
    assert {len(set(names)) for names in drawn[0]} == {4}
    assert {name for names in drawn[0] for name in names} == set(roster)
    other = STRATEGIES["fedavg"](dataclasses.replace(config, seed=1), roster, ServerState(0, START))
    assert [chosen(other, r) for r in range(1, 60)] != drawn[0]


def test_hooks_are_told_in_order():
    calls = []
    hooks = Listener(
        on_start_round=lambda r, names: calls.append(("start", r, names)),
        on_reply=lambda r, name, loss: calls.append((name, r, loss is None)),
    )
    bad = replying(lambda content: content.pop("delta") and None)
    run(config_of(), MemoryGrid(nodes_of(bad)), hooks=hooks)
    assert calls[0] == ("start", 1, ["ant", "bee", "cat"])
    assert sorted(calls[1:]) == [("ant", 1, False), ("bee", 1, True), ("cat", 1, False)]


def test_clients_score_the_new_adapter_before_the_round_is_reported():
    def node(name, loss, count):
        def handler(message):
            if message.metadata.message_type == "train":
                return honest(name)(message)
            metrics = MetricRecord({"loss": loss, "accuracy": 0.5, "num_examples": count})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)

        return handler

    nodes = {101: node("ant", 1.0, 1), 102: node("bee", 4.0, 3), 103: node("cat", float("nan"), 2)}
    config = config_of()
    config = dataclasses.replace(config, evaluation=EvaluationConfig(clients=True))
    state, (report,) = run(config, MemoryGrid(nodes))
    assert report.score == (1.0 * 1 + 4.0 * 3) / 4
    assert report.scores["bee"] == {"loss": 4.0, "accuracy": 0.5}
    assert report.score_failures == {"cat": "its loss is nan, not within 1e+12 of 0"}
    assert report.failures == {}
    assert state.round == 1


def test_server_step_that_overflows_ends_the_run():
    config = config_of()
    config = changed(config, algorithm={"eta": 1e10})
    with pytest.raises(FederationError, match=r"server step failed, 'a' holds .* lower algorithm"):
        run(config, MemoryGrid(nodes_of()))


@pytest.mark.parametrize("name", ["fedavg", "local"])
def test_replies_are_released_as_they_are_added(name):
    """Of 60 large replies, a few at most are alive at any time."""
    shape = (1024, 2048)  # 8 MiB
    names = {f"client-{i:02d}": 10 for i in range(60)}
    roster, alive, peak = roster_of(names), weakref.WeakSet(), []

    def node(message):
        peak.append(len(alive))
        delta = {"a": np.full(shape, 0.5, np.float32)}
        reply = Message(pack_update(Update(delta, 5, {"loss": 1.0}), "float32"), reply_to=message)
        alive.add(reply)
        return reply

    grid = MemoryGrid({client.node_id: node for client in roster.values()})
    start = ServerState(0, {"a": np.zeros(shape, np.float32)})
    state, (report,) = run(config_of(name, timeout_s=60), grid, state=start, roster=roster)
    gc.collect()
    assert len(report.metrics) == 60
    assert (state.params["a"] == (0.5 if name == "fedavg" else 0.0)).all()
    assert max(peak) <= 10
    assert len(alive) == 0
