"""Heterogeneous quadratics: FedAvg drifts to another point, SCAFFOLD reaches the optimum.

Client i minimises F_i(x) = 1/2 (x - b_i)' A_i (x - b_i) by K steps of plain gradient descent. The
optimum of the mean of the F_i is x* = (sum A_i)^-1 sum A_i b_i. The server half is the package's,
the client half is written here from Karimireddy et al. 2020, Algorithm 1.
"""

import numpy as np
import pytest

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import AlgorithmConfig
from fedllm_flwr.federation.combine import RunningMean
from fedllm_flwr.federation.messages import ClientInfo
from fedllm_flwr.federation.roster import Client
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.federation.strategies import STRATEGIES
from strategy_runs import control_step, server_step

NUM_CLIENTS, DIMENSION, STEPS, RATE = 5, 4, 10, 0.05
_RNG = np.random.default_rng(3)
CURVATURE = [np.diag(_RNG.uniform(0.1, 3.0, DIMENSION)) for _ in range(NUM_CLIENTS)]
CENTRE = [_RNG.normal(0, 2, DIMENSION) for _ in range(NUM_CLIENTS)]
OPTIMUM = np.linalg.solve(
    sum(CURVATURE), sum(a @ b for a, b in zip(CURVATURE, CENTRE, strict=True))
)


def make(name):
    roster = {f"c{i}": Client(i + 1, ClientInfo(f"c{i}", 10, "0")) for i in range(NUM_CLIENTS)}
    state = ServerState(0, {"x": np.zeros(DIMENSION)})
    return STRATEGIES[name](Config(algorithm=AlgorithmConfig(name=name)), roster, state)


def descend(i, x, correction):
    """K local steps; the end point, and the gradients on the way."""
    gradients = []
    for _ in range(STEPS):
        gradients.append(CURVATURE[i] @ (x - CENTRE[i]))
        x = x - RATE * (gradients[-1] + correction)
    return x, gradients


def run(name, rounds, sampled=NUM_CLIENTS):
    """x, c and the c_i after `rounds` rounds with `sampled` clients each."""
    strategy = make(name)
    params, moments, control = {"x": np.zeros(DIMENSION)}, {}, strategy.state.tensors.get("control")
    local = [np.zeros(DIMENSION) for _ in range(NUM_CLIENTS)]
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        delta, change, x = RunningMean(), RunningMean(), params["x"]
        for i in sorted(rng.choice(NUM_CLIENTS, sampled, replace=False)):
            correction = np.zeros(DIMENSION) if control is None else control["x"] - local[i]
            end, gradients = descend(i, x, correction)
            delta.add({"x": end - x}, 1.0)
            if control is not None:
                option_two = local[i] - control["x"] + (x - end) / (STEPS * RATE)
                assert np.abs(option_two - np.mean(gradients, axis=0)).max() < 1e-9
                change.add({"x": option_two - local[i]}, 1.0)
                local[i] = option_two
        params, moments = server_step(strategy, params, delta.mean(), moments)
        if control is not None:
            control = control_step(strategy, control, change.sum_over(NUM_CLIENTS))
    return params["x"], control, local


def test_fedavg_stalls_and_scaffold_converges():
    fedavg = np.linalg.norm(run("fedavg", 400)[0] - OPTIMUM)
    longer = np.linalg.norm(run("fedavg", 800)[0] - OPTIMUM)
    scaffold = np.linalg.norm(run("scaffold", 400)[0] - OPTIMUM)
    assert fedavg > 0.1
    assert longer == pytest.approx(fedavg, rel=1e-6)  # it is a fixed point, not slowness
    assert scaffold < 1e-8


def test_scaffold_converges_with_two_of_five_clients_a_round():
    assert np.linalg.norm(run("scaffold", 1500, sampled=2)[0] - OPTIMUM) < 1e-6
    assert np.linalg.norm(run("fedavg", 1500, sampled=2)[0] - OPTIMUM) > 0.1


@pytest.mark.parametrize("sampled", [2, NUM_CLIENTS])
def test_server_variate_is_the_mean_of_the_clients(sampled):
    _, control, local = run("scaffold", 5, sampled)
    np.testing.assert_allclose(control["x"], np.mean(local, axis=0), rtol=0, atol=1e-12)
    assert np.abs(control["x"]).max() > 1e-2  # at the optimum it would be 0, whatever the c_i
