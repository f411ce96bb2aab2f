"""What must hold for the mean and the server steps, whatever the updates."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import AlgorithmConfig
from fedllm_flwr.federation.combine import RunningMean
from fedllm_flwr.federation.messages import ClientInfo
from fedllm_flwr.federation.roster import Client
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.federation.strategies import STRATEGIES
from fedllm_flwr.params import LARGEST_VALUE
from strategy_runs import control_step, server_step

SHAPE = (3,)
# Any float32 a client may send, from the smallest to the largest, and sums that cancel.
any_value = st.floats(-LARGEST_VALUE, LARGEST_VALUE, width=32)
usual_value = st.floats(-10, 10, width=32)
tensors = hnp.arrays(np.float32, SHAPE, elements=any_value)
usual_tensors = hnp.arrays(np.float32, SHAPE, elements=usual_value)
weights = st.integers(1, 10**6)
terms = st.lists(st.tuples(tensors, weights), min_size=1, max_size=6)
usual_terms = st.lists(st.tuples(usual_tensors, weights), min_size=1, max_size=6)
SERVER_OPTIMIZERS = ("fedavg", "fedavgm", "fedadagrad", "fedyogi", "fedadam", "scaffold")


def mean_of(pairs):
    mean = RunningMean()
    for value, weight in pairs:
        mean.add({"w": value}, weight)
    return mean.mean()["w"]


def make(name, **hyper):
    config = Config(algorithm=AlgorithmConfig(name=name, **hyper))
    roster = {"a": Client(1, ClientInfo("a", 10**6, "0"))}
    return STRATEGIES[name](config, roster, ServerState(0, {"w": np.zeros(SHAPE)}))


@given(terms, st.randoms(use_true_random=False))
def test_order_of_arrival_does_not_change_a_bit(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert mean_of(pairs).tobytes() == mean_of(shuffled).tobytes()


def test_every_order_of_terms_that_defeat_float_sums():
    """1e4 + 1e-12 - 1e4 + ...: float64 sums in different orders give different results."""
    values = {1.0e4: 7, 1e-12: 3, -1.0e4: 7, 3.3e-9: 1, -1e-12: 9, 0.1: 11}
    pairs = [(np.full(SHAPE, value, np.float32), weight) for value, weight in values.items()]
    plain = {sum(float(v[0]) * w for v, w in order) for order in itertools.permutations(pairs)}
    ours = {mean_of(order).tobytes() for order in itertools.permutations(pairs)}
    assert len(plain) > 1
    assert len(ours) == 1


@given(terms)
def test_mean_is_the_exact_mean_up_to_rounding(pairs):
    total = sum(weight for _, weight in pairs)
    for i, result in enumerate(mean_of(pairs).tolist()):
        exact = sum(Fraction(float(value[i])) * weight for value, weight in pairs) / total
        assert math.isclose(result, exact, rel_tol=1e-15, abs_tol=1e-18)


@given(terms, st.integers(1, 500))
def test_scaling_all_weights_changes_nothing(pairs, factor):
    scaled = [(value, weight * factor) for value, weight in pairs]
    np.testing.assert_allclose(mean_of(scaled), mean_of(pairs), rtol=1e-15, atol=1e-18)


@given(usual_tensors, st.lists(weights, min_size=1, max_size=6))
def test_equal_deltas_give_that_delta(delta, counts):
    result = mean_of([(delta, count) for count in counts])
    np.testing.assert_allclose(result, delta, rtol=0, atol=2.0**-63)
    visible = np.where(np.abs(delta) < 2.0**-39, 0, delta)  # all 24 bits above 2^-63
    assert (
        mean_of([(visible, count) for count in counts]).tobytes()
        == (
            visible.astype(np.float64) + 0.0  # -0 becomes 0
        ).tobytes()
    )


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
@pytest.mark.parametrize("variant", ["paper", "openfedllm"])
@settings(max_examples=30)
@given(rounds=st.lists(usual_terms, min_size=1, max_size=3), random=st.randoms())
def test_client_order_does_not_matter_to_any_algorithm(name, variant, rounds, random):
    strategy = make(name, variant=variant, beta1=0.5, beta2=0.9)
    states = []
    for shuffle in (False, True):
        params, moments = {"w": np.zeros(SHAPE)}, {}
        for pairs in rounds:
            order = list(pairs)
            if shuffle:
                random.shuffle(order)
            params, moments = server_step(strategy, params, {"w": mean_of(order)}, moments)
        states.append((params["w"].tobytes(), {k: v["w"].tobytes() for k, v in moments.items()}))
    assert states[0] == states[1]


@given(usual_terms)
def test_fedavgm_without_momentum_is_fedavg(pairs):
    delta = {"w": mean_of(pairs)}
    plain, _ = server_step(make("fedavg"), {"w": np.ones(SHAPE)}, delta, {})
    for variant in ("paper", "openfedllm"):
        with_m, _ = server_step(
            make("fedavgm", variant=variant),
            {"w": np.ones(SHAPE)},
            delta,
            {"m": {"w": np.full(SHAPE, 5.0)}},
        )
        assert with_m["w"].tobytes() == plain["w"].tobytes()


@given(usual_terms)
def test_fedprox_without_the_term_is_fedavg(pairs):
    delta = {"w": mean_of(pairs)}
    prox, avg = make("fedprox", mu=0.0), make("fedavg")
    assert prox.rule.mu == avg.rule.mu
    assert prox.rule.weighting == avg.rule.weighting
    ours, _ = server_step(prox, {"w": np.ones(SHAPE)}, delta, {})
    theirs, _ = server_step(avg, {"w": np.ones(SHAPE)}, delta, {})
    assert ours["w"].tobytes() == theirs["w"].tobytes()


@given(
    st.lists(usual_tensors, min_size=2, max_size=5),
    st.lists(st.lists(usual_tensors, min_size=5, max_size=5), min_size=1, max_size=4),
)
def test_server_variate_is_the_mean_of_the_clients_under_full_participation(starts, rounds):
    """Every c_i starts at 0 and moves by dc_i; so does c, by their mean."""
    strategy, num_clients = make("scaffold"), len(starts)
    control = {"w": np.zeros(SHAPE)}
    local = [np.zeros(SHAPE) for _ in starts]
    for changes in [starts, *rounds]:
        total = RunningMean()
        for i in range(num_clients):
            local[i] = local[i] + changes[i]
            total.add({"w": changes[i]}, 1.0)
        control = control_step(strategy, control, total.sum_over(num_clients))
    np.testing.assert_allclose(control["w"], np.mean(local, axis=0), rtol=0, atol=1e-13)


@given(usual_tensors)
def test_local_never_aggregates(delta):
    start = {"w": np.ones(SHAPE)}
    params, moments = server_step(make("local"), start, {"w": delta.astype(np.float64)}, {})
    assert params["w"] is start["w"]
    assert moments == {}
