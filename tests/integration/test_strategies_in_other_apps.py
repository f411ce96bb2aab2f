"""The strategies as a Flower user has them: in a ServerApp and a loop of one's own."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedllm_flwr.client.app import app
from fedllm_flwr.errors import ConfigError, FederationError
from fedllm_flwr.federation.strategies import STRATEGIES, FedAvg, FedYogi, Scaffold
from fedllm_flwr.simulation.inprocess import InProcessGrid
from tiny_runs import NUM_CLIENTS, TINY, run_tiny

ROUNDS = 2


def grid() -> InProcessGrid:
    return InProcessGrid(app, NUM_CLIENTS)


def overrides(*more: str) -> list[str]:
    return [*TINY, "federation.engine=inprocess", *more]


def norm(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    return MetricRecord({"norm": float(sum((a.numpy() ** 2).sum() for a in arrays.values()))})


def same_bits(left: ArrayRecord, right: ArrayRecord) -> bool:
    return {n: a.numpy().tobytes() for n, a in left.items()} == {
        n: a.numpy().tobytes() for n, a in right.items()
    }


@pytest.mark.parametrize("name", ["scaffold", "fedadam"])
def test_start_gives_the_adapter_of_fedllm_run(name: str, tmp_path) -> None:
    strategy = STRATEGIES[name](overrides())
    result = strategy.start(grid(), strategy.initial_arrays(), ROUNDS, evaluate_fn=norm)
    run = run_tiny(tmp_path / "run", f"algorithm={name}")
    from safetensors.numpy import load_file

    saved = load_file(run.adapter / "adapter_model.safetensors")
    found = [array.numpy() for _, array in sorted(result.arrays.items())]
    for mine, (_, theirs) in zip(found, sorted(saved.items()), strict=True):
        np.testing.assert_array_equal(mine, theirs.reshape(mine.shape))
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert sorted(result.evaluate_metrics_serverapp) == [0, 1, 2]


def test_no_argument_of_start_is_ignored() -> None:
    strategy = FedAvg(overrides())
    start = strategy.initial_arrays()
    plain = FedAvg(overrides()).start(grid(), start, 1).arrays
    slower = ConfigRecord({"learning_rate": 1e-5, "min_learning_rate": 1e-6})
    assert not same_bits(plain, FedAvg(overrides()).start(grid(), start, 1, None, slower).arrays)
    moved = ArrayRecord({n: type(a)(a.numpy() + np.float32(0.01)) for n, a in start.items()})
    assert not same_bits(plain, FedAvg(overrides()).start(grid(), moved, 1).arrays)
    scored = FedAvg(overrides("data.validation_fraction=0.2")).start(
        grid(), start, 1, evaluate_config=ConfigRecord({"clients": True})
    )
    assert scored.evaluate_metrics_clientapp[1]["loss"] > 0
    with pytest.raises(ConfigError, match=r"unknown key .training\.lerning_rate."):
        strategy.start(grid(), start, 1, train_config=ConfigRecord({"lerning_rate": 1.0}))


def test_hyper_parameters_are_those_of_the_rule() -> None:
    assert FedYogi(overrides(), eta=0.5).rule.eta == 0.5
    assert FedYogi(overrides()).rule.eta == 1e-3  # as conf/algorithm/fedyogi.yaml says
    with pytest.raises(ConfigError, match="algorithm=fedyogi has no such setting; it takes"):
        FedYogi(overrides(), momentum=0.9)
    with pytest.raises(ConfigError, match="FedYogi carries out algorithm=fedyogi, but"):
        FedYogi(Scaffold(overrides()).config)


def test_flowers_own_loop_gives_the_same_adapter() -> None:
    """`Strategy.start` of Flower over `configure_train` and `aggregate_train`."""
    ours = Scaffold(overrides())
    start = ours.initial_arrays()
    result = ours.start(grid(), start, ROUNDS)
    strategy = Scaffold(overrides(), roster=ours.roster)
    arrays = start
    loop = grid()
    for server_round in range(1, ROUNDS + 1):
        messages = strategy.configure_train(server_round, arrays, ConfigRecord(), loop)
        replies = loop.send_and_receive(messages)
        arrays, metrics = strategy.aggregate_train(server_round, replies)
        assert metrics["loss"] == result.train_metrics_clientapp[server_round]["loss"]
    assert same_bits(arrays, result.arrays)
    assert isinstance(strategy, Strategy)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(FederationError, match="no initial adapter; give `initial_arrays"):
        FedAvg(overrides()).start(grid(), ArrayRecord(), 1)
    with pytest.raises(FederationError, match="no state before `start`"):
        _ = FedAvg(overrides()).state
    with pytest.raises(FederationError, match="give the strategy a roster, or use `start`"):
        FedAvg(overrides()).configure_train(
            1, FedAvg(overrides()).initial_arrays(), ConfigRecord(), grid()
        )
    with pytest.raises(FederationError, match="round 3 was not opened"):
        FedAvg(overrides()).aggregate_train(3, [])
