"""The server steps against the papers, OpenFedLLM and Flower, in float64.

The references below are written from the papers' listings, element by element in plain Python,
and share nothing with the code under test.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import AlgorithmConfig
from fedllm_flwr.federation.combine import RunningMean
from fedllm_flwr.federation.messages import ClientInfo, Update
from fedllm_flwr.federation.roster import Client
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.federation.strategies import STRATEGIES
from strategy_runs import control_step, server_step

ROUNDS = 6
SHAPES = {"q.lora_A": (2, 3), "q.lora_B": (3, 2), "v.lora_A": (4,)}
SIZES = [3, 50, 17]  # examples that the clients hold
USED = [3, 12, 12]  # examples that they train on in a round
HYPER = {"eta": 0.07, "beta1": 0.8, "beta2": 0.9, "tau": 0.02}
SEVEN = ("fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam")


@dataclass
class Element:
    """One scalar weight and the server optimizer's scalars for it."""

    w: float
    m: float | None = None
    v: float = HYPER["tau"] ** 2
    history: list[float] = field(default_factory=list)


def sign(x):
    return (x > 0) - (x < 0)


def paper_step(name, e, delta):
    """One round for one scalar, from the papers' listings."""
    eta, b1, b2, tau = HYPER["eta"], HYPER["beta1"], HYPER["beta2"], HYPER["tau"]
    if name in ("fedavg", "fedprox", "scaffold"):
        e.w = e.w + eta * delta
    elif name == "fedavgm":
        e.m = b1 * (e.m or 0.0) + delta
        e.w = e.w + eta * e.m
    else:
        e.m = b1 * (e.m or 0.0) + (1 - b1) * delta
        if name == "fedadagrad":
            e.v = e.v + delta**2
        elif name == "fedyogi":
            e.v = e.v - (1 - b2) * delta**2 * sign(e.v - delta**2)
        else:
            e.v = b2 * e.v + (1 - b2) * delta**2
        e.w = e.w + eta * e.m / (math.sqrt(e.v) + tau)


def openfedllm_step(name, e, delta):
    """One round for one scalar, from the formulas of OpenFedLLM's aggregation."""
    eta, b1, b2, tau = HYPER["eta"], HYPER["beta1"], HYPER["beta2"], HYPER["tau"]
    if name in ("fedavg", "fedprox", "scaffold"):
        e.w = e.w + eta * delta  # eta = 1 there
        return
    first = e.m is None
    e.m = delta if first or name == "fedadagrad" else b1 * e.m + (1 - b1) * delta
    if name == "fedavgm":
        e.w = e.w + eta * e.m  # eta = 1 there
        return
    if name == "fedadagrad":
        e.v = e.v + e.m**2
    elif name == "fedyogi":
        e.v = e.v - (1 - b2) * e.m**2 * sign(e.v - e.m**2)
    else:
        e.v = b2 * e.v + (1 - b2) * e.m**2
    e.w = e.w + eta * e.m / (math.sqrt(e.v) + tau)


REFERENCE_STEP = {"paper": paper_step, "openfedllm": openfedllm_step}
UNIFORM = {("paper", "scaffold")} | {
    ("openfedllm", name) for name in ("fedadagrad", "fedyogi", "fedadam")
}


def make(name, variant="paper", state=None, **changes):
    """A strategy over the clients a, b, c that hold SIZES examples."""
    config = Config(algorithm=AlgorithmConfig(name=name, variant=variant, **{**HYPER, **changes}))
    roster = {
        client: Client(i + 1, ClientInfo(client, size, "0"))
        for i, (client, size) in enumerate(zip("abc", SIZES, strict=True))
    }
    return STRATEGIES[name](config, roster, state or ServerState(0, draw(99)))


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) * scale for name, shape in SHAPES.items()}


def round_deltas(server_round):
    """Three clients' updates; some elements are zero or of very different sizes."""
    deltas = [draw(1000 * server_round + i, 10.0 ** -(i + 1)) for i in range(3)]
    deltas[0]["v.lora_A"][0] = deltas[1]["v.lora_A"][0] = deltas[2]["v.lora_A"][0] = 0.0
    return deltas


def scalar_mean(values, weights):
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def weighted_mean(strategy, deltas):
    """The mean as a run forms it: the strategy's weights, the package's running sum."""
    mean = RunningMean()
    for size, used, delta in zip(SIZES, USED, deltas, strict=True):
        mean.add(delta, strategy._rounds.weight(Update(delta, used, {}), size))
    return mean.mean()


@pytest.mark.parametrize("variant", ["paper", "openfedllm"])
@pytest.mark.parametrize("name", SEVEN)
def test_server_matches_the_listing(name, variant):
    strategy = make(name, variant)
    params, moments = draw(99), {}
    elements = {
        (tensor, index): Element(float(value[index]))
        for tensor, value in params.items()
        for index in np.ndindex(value.shape)
    }
    weights = [1, 1, 1] if (variant, name) in UNIFORM else SIZES
    for server_round in range(1, ROUNDS + 1):
        deltas = round_deltas(server_round)
        params, moments = server_step(strategy, params, weighted_mean(strategy, deltas), moments)
        for (tensor, index), element in elements.items():
            delta = scalar_mean([float(d[tensor][index]) for d in deltas], weights)
            REFERENCE_STEP[variant](name, element, delta)
            assert params[tensor][index] == pytest.approx(element.w, rel=1e-11, abs=1e-13)
            if "v" in moments:
                assert moments["v"][tensor][index] == pytest.approx(element.v, rel=1e-11)
    assert params["q.lora_A"].dtype == np.float64
    assert all(v.dtype == np.float64 for group in moments.values() for v in group.values())


@pytest.mark.parametrize(
    ("weighting", "counts"), [("examples", SIZES), ("used", USED), ("uniform", [1, 1, 1])]
)
@pytest.mark.parametrize("variant", ["paper", "openfedllm"])
def test_fedavg_weights_are_mcmahans(variant, weighting, counts):
    """w <- sum_k (n_k / n) w_k (McMahan et al. 2017, Algorithm 1), n_k as asked for."""
    strategy, start = make("fedavg", variant, eta=1.0, weighting=weighting), draw(99)
    deltas = round_deltas(1)
    params, _ = server_step(strategy, start, weighted_mean(strategy, deltas), {})
    for name in SHAPES:
        clients = [start[name] + delta[name] for delta in deltas]
        n = sum(counts)
        expected = sum(n_k / n * w_k for n_k, w_k in zip(counts, clients, strict=True))
        np.testing.assert_allclose(params[name], expected, rtol=1e-12, atol=1e-14)
    if weighting == "examples":
        assert make("fedavg", variant).rule.weighting[variant] == "examples"  # the default


@pytest.mark.parametrize("name", SEVEN)
def test_server_step_is_pure(name):
    strategy, params, delta = make(name), draw(1), draw(2)
    _, moments = server_step(strategy, params, delta, {})
    copies = {k: {n: v.copy() for n, v in group.items()} for k, group in moments.items()}
    first = server_step(strategy, params, delta, moments)
    second = server_step(strategy, params, delta, moments)
    np.testing.assert_equal(first, second)
    np.testing.assert_equal(moments, copies)
    np.testing.assert_equal((params, delta), (draw(1), draw(2)))


@pytest.mark.parametrize("name", ["fedavgm", "fedyogi", "fedadam"])
def test_variants_differ_where_the_seed_differs(name):
    deltas = [draw(1), draw(2)]
    results = {}
    for variant in ("paper", "openfedllm"):
        params, moments = draw(99), {}
        for delta in deltas:
            params, moments = server_step(make(name, variant), params, delta, moments)
        results[variant] = params["q.lora_A"]
    assert np.abs(results["paper"] - results["openfedllm"]).max() > 1e-3


def test_adagrad_of_openfedllm_has_no_momentum():
    for beta1 in (0.0, 0.9):
        _, moments = server_step(
            make("fedadagrad", "openfedllm", beta1=beta1),
            draw(99),
            draw(2),
            {"m": draw(3), "v": {k: np.ones(s) for k, s in SHAPES.items()}},
        )
        np.testing.assert_array_equal(moments["m"]["q.lora_A"], draw(2)["q.lora_A"])


def test_scaffold_server_control():
    """c <- c + sum(dc_i) / N over several rounds; N = 3 clients, two of them reply."""
    strategy, control = make("scaffold"), {name: np.zeros(s) for name, s in SHAPES.items()}
    expected = {name: np.zeros(s).tolist() for name, s in {"v.lora_A": (4,)}.items()}
    for server_round in range(ROUNDS):
        changes = [draw(10 * server_round + i) for i in range(2)]
        total = RunningMean()
        for change in changes:
            total.add(change, 1.0)
        control = control_step(strategy, control, total.sum_over(len(strategy.roster)))
        for i in range(4):
            expected["v.lora_A"][i] += (
                float(changes[0]["v.lora_A"][i]) + float(changes[1]["v.lora_A"][i])
            ) / 3
    np.testing.assert_allclose(control["v.lora_A"], expected["v.lora_A"], rtol=1e-12)


# Flower's own strategies.


def flower_rounds(strategy, rounds):
    """Run a built-in strategy on the clients' updates; the weights after each round."""
    params, history = draw(99), []
    for server_round in range(1, rounds + 1):
        arrays = ArrayRecord({name: FlowerArray(value) for name, value in params.items()})
        # What configure_train keeps, without sampling nodes from a grid.
        strategy.current_arrays = (
            arrays
            if isinstance(strategy, flower.FedAvgM)
            else {name: value.copy() for name, value in params.items()}
        )
        replies = []
        for i, delta in enumerate(round_deltas(server_round)):
            local = {name: FlowerArray(params[name] + delta[name]) for name in params}
            content = RecordDict(
                {"arrays": ArrayRecord(local), "m": MetricRecord({"num-examples": SIZES[i]})}
            )
            question = Message(RecordDict({"c": ConfigRecord()}), i + 1, "train")
            replies.append(Message(content, reply_to=question))
        new_arrays, _ = strategy.aggregate_train(server_round, replies)
        params = {name: array.numpy() for name, array in new_arrays.items()}
        history.append(params)
    return history


def our_rounds(strategy, rounds, moments):
    params, history = draw(99), []
    for server_round in range(1, rounds + 1):
        mean = weighted_mean(strategy, round_deltas(server_round))
        params, moments = server_step(strategy, params, mean, moments)
        history.append(params)
    return history


def zero_moments():
    return {
        "m": {name: np.zeros(s) for name, s in SHAPES.items()},
        "v": {name: np.zeros(s) for name, s in SHAPES.items()},
    }


def assert_same(ours, theirs, rtol=1e-9):
    for mine, flowers in zip(ours, theirs, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(mine[name], flowers[name], rtol=rtol, atol=1e-12)


def test_fedavg_is_flowers():
    assert_same(our_rounds(make("fedavg", eta=1.0), ROUNDS, {}), flower_rounds(flower.FedAvg(), 6))


def test_fedavgm_is_flowers():
    theirs = flower.FedAvgM(server_learning_rate=HYPER["eta"], server_momentum=HYPER["beta1"])
    assert_same(our_rounds(make("fedavgm"), ROUNDS, {}), flower_rounds(theirs, ROUNDS))


FLOWER_ADAPTIVE = {
    "fedadagrad": lambda: flower.FedAdagrad(eta=HYPER["eta"], tau=HYPER["tau"]),
    "fedyogi": lambda: flower.FedYogi(
        eta=HYPER["eta"], beta_1=HYPER["beta1"], beta_2=HYPER["beta2"], tau=HYPER["tau"]
    ),
}


@pytest.mark.parametrize("name", FLOWER_ADAPTIVE)
def test_flower_starts_v_at_zero_and_agrees_otherwise(name):
    changes = {"beta1": 0.0} if name == "fedadagrad" else {}
    theirs = flower_rounds(FLOWER_ADAPTIVE[name](), ROUNDS)
    assert_same(our_rounds(make(name, **changes), ROUNDS, zero_moments()), theirs)
    papers = our_rounds(make(name, **changes), 1, {})  # v_-1 = tau^2
    assert np.abs(papers[0]["q.lora_A"] - theirs[0]["q.lora_A"]).max() > 1e-4


def test_flowers_fedadam_adds_a_bias_correction():
    """Flower scales eta by sqrt(1 - b2^(r+1)) / (1 - b1^(r+1)), which Algorithm 2 does not."""
    b1, b2 = HYPER["beta1"], HYPER["beta2"]
    theirs = flower_rounds(
        flower.FedAdam(eta=HYPER["eta"], beta_1=b1, beta_2=b2, tau=HYPER["tau"]), ROUNDS
    )
    params, moments = draw(99), zero_moments()
    for server_round in range(1, ROUNDS + 1):
        correction = math.sqrt(1 - b2 ** (server_round + 1)) / (1 - b1 ** (server_round + 1))
        ours = make("fedadam", eta=HYPER["eta"] * correction)
        mean = weighted_mean(ours, round_deltas(server_round))
        params, moments = server_step(ours, params, mean, moments)
        assert_same([params], [theirs[server_round - 1]])
    uncorrected = our_rounds(make("fedadam"), ROUNDS, zero_moments())
    assert np.abs(uncorrected[0]["q.lora_A"] - theirs[0]["q.lora_A"]).max() > 1e-3
