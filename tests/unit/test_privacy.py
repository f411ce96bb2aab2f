"""Clipping, noise, the account, and the release of a round's sum."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from opacus.accountants import RDPAccountant
from scipy import stats

from fedllm_flwr.config import changed
from fedllm_flwr.config.compose import compose
from fedllm_flwr.errors import ConfigError, NotFiniteError
from fedllm_flwr.federation.channel import NoReplyError, Reply
from fedllm_flwr.federation.mechanism import ClientMechanism, plan_budget, split_noise
from fedllm_flwr.federation.messages import Update
from fedllm_flwr.federation.recorder import Recorder, RoundReport
from fedllm_flwr.federation.rounds import Rounds
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.federation.state import ServerState, load_state, save_state
from fedllm_flwr.params import Params
from fedllm_flwr.privacy.accounting import Release, calibrated, default_delta, epsilon
from fedllm_flwr.privacy.clipping import clipped, joint_norm
from fedllm_flwr.privacy.noise import Noise
from strategy_runs import SIZES, START, config_of, roster_of

FLOATS = (np.float16, np.float32, np.float64)


@st.composite
def contributions(draw):
    """Two groups of tensors of any float dtype, from subnormal to the largest values."""
    groups = {}
    for group in ("delta", "control_delta"):
        dtype = draw(st.sampled_from(FLOATS))
        values = st.floats(
            width=8 * np.dtype(dtype).itemsize, allow_nan=False, allow_infinity=False
        )
        groups[group] = {"w": draw(hnp.arrays(dtype, draw(st.integers(0, 5)), elements=values))}
    return groups


@given(contributions(), st.floats(1e-3, 1e6))
@settings(max_examples=200, deadline=None)
def test_a_clipped_norm_is_never_above_the_bound(groups, bound):
    result = clipped(groups, bound)
    assert joint_norm(result) <= bound
    if joint_norm(groups) <= bound:
        assert all(result[g]["w"] is groups[g]["w"] for g in groups)
    for group, params in groups.items():
        assert result[group]["w"].dtype == params["w"].dtype


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_is_refused(value):
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        clipped({"delta": {"w": np.array([1.0, value])}}, 1.0)


def test_one_norm_for_all_tensors():
    groups = {"delta": {"a": np.array([3.0]), "b": np.array([0.0])}, "x": {"a": np.array([4.0])}}
    assert joint_norm(groups) == 5
    np.testing.assert_allclose(clipped(groups, 1.0)["x"]["a"], [0.8], rtol=1e-12)


def test_noise_has_the_stated_variance_and_shape():
    noise = Noise().on({"w": np.zeros(1_000_000)}, 2.5)["w"] / 2.5
    assert 1e-4 < stats.chi2.cdf(np.square(noise).sum(), noise.size) < 1 - 1e-4
    assert stats.kstest(noise[:100_000], "norm").pvalue > 1e-4
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 5e-3


@pytest.mark.parametrize("deviation", [0.4, 1.0, 3.3, 50.0])
def test_discrete_noise_has_the_stated_probabilities(deviation):
    drawn = Noise().discrete_normal(200_000, deviation)
    most = math.ceil(9 * deviation)
    weights = np.exp(-np.square(np.arange(-most, most + 1)) / (2 * deviation**2))
    expected = weights / weights.sum() * drawn.size
    counts = np.bincount(drawn + most, minlength=2 * most + 1)
    often = expected > 20
    pairs = ([*e[often], e[~often].sum() + 1] for e in (counts, expected))
    assert stats.chisquare(*pairs).pvalue > 1e-4


def test_discrete_noise_of_a_large_deviation_is_normal():
    drawn = Noise().discrete_normal(200_000, 2.0**24 / 3)
    assert stats.kstest(drawn / (2.0**24 / 3), "norm").pvalue > 1e-4
    assert drawn.shape == (200_000,)


def test_samples_are_of_the_stated_sizes():
    sizes = [len(Noise().poisson_sample(100, 0.3)) for _ in range(300)]
    assert abs(np.mean(sizes) - 30) < 5 * math.sqrt(21 / 300)
    assert 10 < np.var(sizes) < 40
    assert len(set(Noise().fixed_sample(100, 30))) == 30


# The account


def test_epsilon_of_dp_sgd_equals_that_of_opacus():
    """MNIST of Abadi et al.: 60 epochs of 256 of 60,000; RDP as Opacus' default, PLD below it."""
    opacus = RDPAccountant()
    opacus.history = [(1.1, 256 / 60_000, 14_062)]
    ours = epsilon({Release(1.1, "poisson", 256, 60_000): 14_062}, 1e-5)
    assert ours < opacus.get_epsilon(1e-5) < 1.15 * ours
    from opacus.accountants import PRVAccountant

    prv = PRVAccountant()
    prv.history = [(1.1, 256 / 60_000, 14_062)]
    assert ours == pytest.approx(prv.get_epsilon(1e-5), rel=0.01)


def test_epsilon_equals_the_closed_form_of_gaussians():
    """16 Gaussian mechanisms are one with a quarter of the noise (Balle and Wang 2018)."""
    ours = epsilon({Release(8.0, "visible", 3, 3): 16}, 1e-5)
    sigma, normal = 2.0, stats.norm.cdf

    def delta(eps):
        return normal(1 / (2 * sigma) - eps * sigma) - math.exp(eps) * normal(
            -1 / (2 * sigma) - eps * sigma
        )

    assert delta(ours) <= 1e-5 < delta(0.99 * ours)


@pytest.mark.parametrize(("multiplier", "clients"), [(0.5, 20), (1.0, 100), (4.9, 50)])
def test_a_sum_and_its_indicators_are_one_gaussian_mechanism(multiplier, clients):
    """Andrew et al. 2021, theorem 1; indicators, shifted by a half, have sensitivity 1/2."""
    deviation, raised = split_noise(multiplier, clients)
    assert deviation == clients / 20  # as tensorflow_federated's adaptive_clip_noise_params
    parts = {Release(raised, "visible", 1, 1): 1, Release(2 * deviation, "visible", 1, 1): 1}
    whole = epsilon({Release(multiplier, "visible", 1, 1): 1}, 1e-5)
    assert epsilon(parts, 1e-5) == pytest.approx(whole, rel=2e-3)


@pytest.mark.parametrize("delta", [1e-5, 1e-2])
def test_epsilon_of_shared_noise_is_that_of_its_concentrated_privacy(delta):
    """12 rounds of rho = 1 / (2 z^2), by the conversion of Canonne et al. 2020."""
    release, rho = Release(2.0, "visible", 7, 10, discrete=True), 12 / (2 * 2.0**2)
    orders = np.linspace(1.01, 200, 100_000)
    converted = orders * rho + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    ours = epsilon({release: 12}, delta)
    assert ours == pytest.approx(converted.min(), rel=1e-3)
    assert ours > epsilon({replace(release, discrete=False): 12}, delta)
    both = epsilon({release: 12, Release(2.0, "visible", 7, 10): 1}, delta)
    assert ours < both < 1.5 * ours + epsilon({Release(2.0, "visible", 7, 10): 1}, delta / 2)


@pytest.mark.parametrize("sampling", ["fixed", "poisson", "visible"])
def test_calibrated_noise_spends_the_target_and_no_more(sampling):
    release = Release(0.0, sampling, 4, 100)
    multiplier = calibrated(release, 10, 4.0, 1e-3)
    spent = epsilon({replace(release, noise_multiplier=multiplier): 10}, 1e-3)
    assert 3.95 < spent <= 4


def test_a_target_out_of_reach_is_refused_before_anything_starts():
    config = changed(
        config_of("fedavg"), privacy={"unit": "client", "target_epsilon": 1e-5, "delta": 1e-6}
    )
    with pytest.raises(ConfigError, match=r"privacy\.target_epsilon=1e-05 .* out of reach"):
        plan_budget(config, SIZES)


RECORD = "privacy.unit=record"
REFUSED = {
    "privacy.noise_multiplier=0 privacy.target_epsilon=8": "keeps to no privacy.target_epsilon=8",
    "privacy.noise_multiplier=null": "needs noise",
    "algorithm.weighting=examples": "algorithm.weighting=examples with privacy.unit=client",
    "algorithm=local": "algorithm=local with privacy.unit=client",
    "algorithm=centralized": "algorithm=centralized with privacy.unit=client",
    "evaluation.clients=true": "evaluation.clients=true with privacy.unit=client",
    "federation.min_replies=1": "federation.min_replies=1 with privacy.sampling=poisson",
    "algorithm=scaffold privacy.clip_quantile=0.5": "privacy.clip_quantile=0.5 with",
    "algorithm.combiner=median": "algorithm.combiner=median with privacy.unit=client",
    "algorithm=flora": "privacy.unit=client does not work with algorithm=flora",
    "privacy.secure_aggregation=true": "privacy.sampling=poisson with privacy.unit=client and",
    "privacy.secure_aggregation=true privacy.sampling=visible privacy.clip_quantile=0.5": (
        "privacy.clip_quantile=0.5 with privacy.secure_aggregation=true"
    ),
    "communication.transforms=[int8]": "communication.transforms=[int8] with privacy.unit=client",
    f"{RECORD} privacy.secure_aggregation=true communication.transforms=[int8]": "masked sums",
    f"{RECORD} lora.dora=true": "lora.dora=true with privacy.unit=record",
    f"{RECORD} task=dpo dpo.loss_type=aot": "it sorts the pairs of a batch",
    f"{RECORD} training.packing=true": "training.packing=true with privacy.unit=record",
    f"{RECORD} training.dtype=float16": "training.dtype=float16 with privacy.unit=record",
    f"{RECORD} evaluation.clients=true": "evaluation.clients=true with privacy.unit=record",
    f"{RECORD} privacy.clip_quantile=0.5": "privacy.clip_quantile=0.5 with privacy.unit=record",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(overrides):
    given = [] if "noise" in overrides else ["privacy.noise_multiplier=1"]
    given += [] if RECORD in overrides else ["privacy.unit=client"]
    with pytest.raises(ConfigError) as caught:
        compose([*given, *overrides.split()])
    assert REFUSED[overrides] in str(caught.value)
    assert "\n" not in str(caught.value)


# The release


class Reports(Recorder):
    def __init__(self, root: Path | None = None) -> None:
        self.reports: list[RoundReport] = []
        self.root = root

    def on_round(self, state, report):
        self.reports.append(report)
        if self.root is not None:
            save_state(self.root, state, keep=2)


class Clients:
    """Clients that send given updates, or none."""

    def __init__(self, updates: dict[str, float | None]) -> None:
        self.roster = roster_of()
        self.updates = updates

    def settle(self):
        """Nothing."""

    def exchange(self, request, assignments, timeout_s, expected):
        for name, assignment in assignments.items():
            value = self.updates[name]
            delta: Params = {
                key: np.full_like(v, value or 0) for key, v in assignment.params.items()
            }
            contributed = {"control_delta": delta} if "control" in assignment.sent else {}
            answer = Update(delta, 1, {"loss": 1.0}, contributed)
            yield Reply(name, NoReplyError("away") if value is None else answer)

    def take_notes(self):
        return []


def run(root: Path, updates, rounds=1, algorithm="fedavg", recorder=None, state=None, **privacy):
    config = config_of(algorithm, min_replies=1, num_rounds=rounds)
    config = changed(config, privacy={"unit": "client", "sampling": "visible", **privacy})
    recorder = recorder or Reports()
    made = Rounds(find_rule(config.algorithm), config, recorder, root)
    channel = Clients(updates)
    state = made.begin(state or ServerState(0, START), channel.roster)
    return made.run(state, channel, last=rounds, timeout_s=1.0), recorder


HUGE = dict.fromkeys(("ant", "bee", "cat"), 1000.0)


def test_the_server_clips_what_a_client_has_not(tmp_path):
    final, recorder = run(tmp_path, HUGE, clip=0.5, noise_multiplier=0.0)
    assert joint_norm({"moved": {n: final.params[n] - START[n] for n in START}}) <= 0.5 + 1e-6
    assert recorder.reports[0].ignored == [
        f"{name}: its update exceeds privacy.clip; clipped here" for name in HUGE
    ]


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fedyogi"])
def test_without_noise_and_bound_the_bits_are_those_without_privacy(algorithm, tmp_path):
    updates = {"ant": 0.1, "bee": -0.7, "cat": 0.25}
    plain = changed(config_of(algorithm, num_rounds=3), algorithm={"weighting": "uniform"})
    made = Rounds(find_rule(plain.algorithm), plain, Recorder(), tmp_path / "plain")
    channel = Clients(updates)
    expected = made.run(
        made.begin(ServerState(0, START), channel.roster), channel, last=3, timeout_s=1.0
    )
    final, _ = run(tmp_path / "dp", updates, 3, algorithm, clip=1e18, noise_multiplier=0.0)
    for name in START:
        assert final.params[name].tobytes() == expected.params[name].tobytes()


def test_a_client_that_does_not_reply_adds_zero(tmp_path):
    updates = {"ant": 0.3, "bee": 0.3, "cat": None}
    final, _ = run(tmp_path, updates, clip=1e18, noise_multiplier=0.0)
    for name in START:
        np.testing.assert_allclose(final.params[name], START[name] + 0.2, rtol=1e-6)


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_the_noise_on_the_sum_has_the_stated_variance(algorithm, tmp_path):
    """On update and control variate alike; the sum of the one is divided by m, the other's by N."""
    size, clip, multiplier = 500_000, 0.5, 3.0
    privacy = {"unit": "client", "clip": clip, "noise_multiplier": multiplier}
    config = changed(config_of(algorithm, sample_clients=2), privacy=privacy)
    mechanism = ClientMechanism(config, tmp_path / "log")
    groups = {"delta": {"w": np.zeros(size)}, "control_delta": {"w": np.zeros(size)}}
    state = ServerState(0, {"w": np.zeros(size)}, clients=dict.fromkeys("abcde"))
    released, _ = mechanism.release(state, roster_of(), groups, [True, True])
    for group, divisor in (("delta", 2), ("control_delta", 5)):
        scaled = released[group]["w"] / (multiplier * clip / divisor)
        assert 1e-4 < stats.chi2.cdf(np.square(scaled).sum(), size) < 1 - 1e-4
    assert abs(np.corrcoef(released["delta"]["w"], released["control_delta"]["w"])[0, 1]) < 0.01


def test_a_round_done_again_is_another_release(tmp_path):
    """A server that stops before its checkpoint and starts again never repeats noise, and pays."""
    state = ServerState(0, START)
    first, _ = run(tmp_path, HUGE, noise_multiplier=1.0, clip=1.0, state=state)
    again, recorder = run(tmp_path, HUGE, noise_multiplier=1.0, clip=1.0, state=state)
    assert all((first.params[name] != again.params[name]).all() for name in START)
    twice = epsilon({Release(1.0, "visible", 3, 3): 2}, default_delta(3))
    assert recorder.reports[0].spent == (pytest.approx(twice), default_delta(3))


def test_a_run_ends_before_its_budget_also_over_a_resume(tmp_path):
    once = epsilon({Release(1.0, "visible", 3, 3): 1}, 1e-2)
    four = epsilon({Release(1.0, "visible", 3, 3): 4}, 1e-2)
    privacy = {"noise_multiplier": 1.0, "target_epsilon": four + 0.01, "delta": 1e-2}
    kept, first = tmp_path / "checkpoints", Reports(tmp_path / "checkpoints")
    run(tmp_path, HUGE, 2, recorder=first, **privacy)
    assert [r.is_last for r in first.reports] == [False, False]
    assert first.reports[0].spent == (pytest.approx(once), 1e-2)
    second = Reports(kept)
    final, _ = run(tmp_path, HUGE, 20, recorder=second, state=load_state(kept)[0], **privacy)
    assert [r.round for r in second.reports] == [3, 4]
    assert [r.is_last for r in second.reports] == [False, True]
    assert second.reports[-1].spent[0] <= privacy["target_epsilon"]
    third = Reports()
    same, _ = run(tmp_path, HUGE, 20, recorder=third, state=final, **privacy)
    assert not third.reports
    assert same.round == 4


def test_records_are_accounted_for_by_client(tmp_path):
    """The smallest client, whose records are drawn most often, has the largest epsilon."""
    config = config_of("fedavg", min_replies=1, num_rounds=2)
    privacy = {"unit": "record", "target_epsilon": 8.0}
    training = {"max_steps": 5, "batch_size": 1}
    config = changed(config, privacy=privacy, training=training)
    recorder, channel = Reports(), Clients({**HUGE, "cat": None})
    made = Rounds(find_rule(config.algorithm), config, recorder, tmp_path)
    made.run(made.begin(ServerState(0, START), channel.roster), channel, last=2, timeout_s=1.0)
    sent = made.open(ServerState(0, START, clients=dict.fromkeys(SIZES)), channel.roster, 2)
    noise = sent.assignments["ant"].config.privacy.noise_multiplier
    smallest, delta = min(SIZES.values()), default_delta(max(SIZES.values()))
    assert recorder.reports[1].spent == (
        pytest.approx(epsilon({Release(noise, "poisson", 1, smallest): 10}, delta)),
        delta,
    )
    assert 7.9 < recorder.reports[1].spent[0] <= 8
    assert recorder.reports[1].is_last


def test_poisson_rounds_may_be_empty(tmp_path):
    final, recorder = run(tmp_path, HUGE, 12, sampling="poisson", noise_multiplier=5.0, clip=1e-3)
    sizes = [len(report.sampled) for report in recorder.reports]
    assert final.round == 12
    assert len(sizes) == 12


def test_the_clip_follows_a_quantile_of_the_norms(tmp_path):
    """Norms 0.01, 2 and 200: C falls from 50 to a value between the first two and back (median)."""
    updates = {"ant": 0.01, "bee": 2.0, "cat": 200.0}
    final, _ = run(
        tmp_path, updates, 60, clip=50.0, clip_quantile=0.5, noise_multiplier=0.0,
        clip_learning_rate=0.3,
    )  # fmt: skip
    norm = joint_norm({"update": {n: np.full_like(v, 2.0) for n, v in START.items()}})
    assert float(final.tensors["privacy"]["clip"][0]) == pytest.approx(norm, rel=0.2)
