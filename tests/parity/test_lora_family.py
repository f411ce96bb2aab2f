"""The rules about A and B against the papers, transcribed with whole matrices, and against PEFT."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from fedllm_flwr.config.schema import AlgorithmConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.factors import (
    aggregation_error,
    cut,
    folded,
    module_norms,
    rank_of,
    stacked,
    truncated,
)
from fedllm_flwr.federation.rule import Counts, find_rule
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.training.drift import DriftCorrection

MODULES = {"h.0.q": (7, 9), "h.1.v": (8, 6)}  # (out, in)
RANK, SIZES = 4, (3, 50, 17)
SHARES = [size / sum(SIZES) for size in SIZES]
RANKS = (2, 4, 1)  # of the clients, where they differ


def draw(seed, rank=RANK, scale=1.0):
    rng = np.random.default_rng(seed)
    adapter = {}
    for module, (rows, columns) in MODULES.items():
        adapter[f"{module}.lora_A.weight"] = rng.normal(size=(rank, columns)) * scale
        adapter[f"{module}.lora_B.weight"] = rng.normal(size=(rows, rank)) * scale
    return adapter


def product(adapter, module):
    return adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]


def step(name, state, adapters, shares=SHARES, **options):
    """The rule's step of a round in which the clients have come to `adapters`."""
    rule = find_rule(AlgorithmConfig(name=name, options=options, factors=FACTORS.get(name, "both")))
    combined = {}
    if not rule.any_rank:
        names = [n for n in state.params if rule.shares(n, state.round + 1)]
        terms = list(zip(shares, adapters, strict=True))
        combined["delta"] = {n: sum(p * (a[n] - state.params[n]) for p, a in terms) for n in names}
    names = [f"client-{i}" for i in range(len(adapters))]
    counts = Counts(len(adapters), len(adapters), sum(SIZES), adapters, shares, names)
    return replace(rule.step(state, combined, counts), round=state.round + 1)


FACTORS = {"ffa": "b", "rolora": "alternate"}


def mean_product(adapters, module, shares=SHARES):
    return sum(p * product(a, module) for p, a in zip(shares, adapters, strict=True))


def assert_products(adapter, expected, tolerance=1e-10):
    for module in MODULES:
        np.testing.assert_allclose(
            product(adapter, module), expected[module], rtol=0, atol=tolerance
        )


def clients(round_number, ranks=(RANK,) * 3, scale=1.0):
    return [draw([round_number, i], rank, scale) for i, rank in enumerate(ranks)]


@pytest.mark.parametrize("name", ["ffa", "rolora"])
def test_one_factor_at_a_time_is_exact(name):
    state = ServerState(0, draw(99))
    for number in (1, 2, 3):
        trained = "lora_B" if name == "ffa" or number % 2 else "lora_A"
        adapters = [
            {n: v if trained in n else state.params[n] for n, v in a.items()}
            for a in clients(number)
        ]
        new = step(name, state, adapters)
        for tensor, value in new.params.items():
            if trained not in tensor:
                assert value is state.params[tensor]
        assert_products(new.params, {m: mean_product(adapters, m) for m in MODULES})
        assert aggregation_error(adapters, SHARES, {}, new.params) < 1e-7
        state = new


def test_lora_fair_is_the_regularised_least_squares_solution():
    """dB by lstsq on [A'; sqrt(lambda) I] dB' = [(M - B A)'; 0], column by column."""
    strength, adapters = 0.3, clients(1)
    new = step("lora_fair", ServerState(0, draw(99)), adapters, strength=strength)
    fedavg = step("fedavg", ServerState(0, draw(99)), adapters)
    for module in MODULES:
        a = sum(p * c[f"{module}.lora_A.weight"] for p, c in zip(SHARES, adapters, strict=True))
        b = sum(p * c[f"{module}.lora_B.weight"] for p, c in zip(SHARES, adapters, strict=True))
        left = np.vstack([a.T, np.sqrt(strength) * np.eye(RANK)])
        right = np.vstack([(mean_product(adapters, module) - b @ a).T, np.zeros((RANK, len(b)))])
        change = np.linalg.lstsq(left, right, rcond=None)[0].T
        np.testing.assert_allclose(new.params[f"{module}.lora_A.weight"], a, atol=1e-12)
        np.testing.assert_allclose(new.params[f"{module}.lora_B.weight"], b + change, atol=1e-10)
    errors = [aggregation_error(adapters, SHARES, {}, s.params) for s in (new, fedavg)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_base_weights_move_as_in_the_paper(name):
    """s times the residual, or times the stack, is added to W each round; five rounds, exactly."""
    state, scale = ServerState(0, draw(99, scale=0.1)), 2.0
    base = {module: np.zeros(shape) for module, shape in MODULES.items()}
    for number in range(1, 6):
        ranks = RANKS if name == "flora" else (RANK,) * 3
        adapters = clients(number, ranks, 0.1)
        before = state.tensors.get("frozen", {})
        state = step(name, state, adapters)
        for module in MODULES:
            new = mean_product(adapters, module)
            if name == "fedex":
                new = new - product(state.params, module)
            base[module] += scale * new
        frozen = state.tensors["frozen"]
        assert_products(frozen, {m: w / scale for m, w in base.items()}, 1e-8)
        assert aggregation_error(adapters, SHARES, before, state.adapter) < 1e-6
    if name == "flora":
        assert all(not v.any() for n, v in state.params.items() if "lora_B" in n)


def test_beyond_the_cap_what_is_kept_is_the_best_of_its_rank():
    adapters = clients(1, RANKS)
    state = step("flora", ServerState(0, draw(99)), adapters, max_rank=3)
    for module in MODULES:
        u, s, v = np.linalg.svd(mean_product(adapters, module))
        best = u[:, :3] * s[:3] @ v[:3]
        np.testing.assert_allclose(product(state.tensors["frozen"], module), best, atol=1e-10)
    assert aggregation_error(adapters, SHARES, {}, state.adapter) > 1e-3


@pytest.mark.parametrize("by_rank", [False, True])
def test_flexlora_is_the_svd_of_the_mean_product(by_rank):
    adapters = clients(1, RANKS)
    new = step("flexlora", ServerState(0, draw(99)), adapters, by_rank=by_rank)
    for module in MODULES:
        mean = mean_product(adapters, module)
        if by_rank:  # rank 1 at a time: the clients that have it, by their shares among these
            mean = np.zeros(MODULES[module])
            for j in range(RANK):
                having = [i for i, rank in enumerate(RANKS) if rank > j]
                for i in having:
                    b = adapters[i][f"{module}.lora_B.weight"][:, j]
                    a = adapters[i][f"{module}.lora_A.weight"][j]
                    mean += SIZES[i] / sum(SIZES[k] for k in having) * np.outer(b, a)
        u, s, v = np.linalg.svd(mean)
        for rank in (1, 2, RANK):  # what a client of this rank is sent
            best = u[:, :rank] * s[:rank] @ v[:rank]
            np.testing.assert_allclose(product(cut(new.params, rank), module), best, atol=1e-10)


def test_flexlora_never_leaves_a_direction_that_no_client_can_train():
    """One client of rank 1 replied: B is 0 in the other directions, A is not."""
    new = step("flexlora", ServerState(0, draw(99)), clients(1, (1,)), [1.0])
    for module in MODULES:
        rows = np.linalg.norm(new.params[f"{module}.lora_A.weight"], axis=1)
        np.testing.assert_allclose(rows, 1.0)
        assert np.abs(new.params[f"{module}.lora_B.weight"][:, 1:]).max() < 1e-12


def test_hetlora_pads_and_weights_by_the_norms():
    adapters = clients(1, RANKS)
    new = step("hetlora", ServerState(0, draw(99)), adapters)
    for module, (rows, columns) in MODULES.items():
        norms = [np.linalg.norm(product(a, module)) for a in adapters]
        a_sum, b_sum = np.zeros((RANK, columns)), np.zeros((rows, RANK))
        for adapter, size, rank in zip(adapters, norms, RANKS, strict=True):
            a_sum[:rank] += size / sum(norms) * adapter[f"{module}.lora_A.weight"]
            b_sum[:, :rank] += size / sum(norms) * adapter[f"{module}.lora_B.weight"]
        np.testing.assert_allclose(new.params[f"{module}.lora_A.weight"], a_sum, atol=1e-12)
        np.testing.assert_allclose(new.params[f"{module}.lora_B.weight"], b_sum, atol=1e-12)


def test_hetlora_prunes_the_ranks_whose_tail_has_shrunk():
    """Clients 0 and 1 train from the same start; the tail of 0 has shrunk, that of 1 has grown."""
    state = ServerState(0, draw(99))
    factors = (0.5, 2.0)
    adapters = []
    for factor in factors:
        adapter = {n: v.copy() for n, v in state.params.items()}
        for name, value in adapter.items():
            (value[2:] if "lora_A" in name else value[:, 2:])[:] *= factor
        adapters.append(adapter)
    new = step("hetlora", state, adapters, [0.5, 0.5], gamma=0.5, strength=0.1)
    rule = find_rule(AlgorithmConfig(name="hetlora", options={"gamma": 0.5, "strength": 0.1}))
    assert [rule.rank(new, f"client-{i}", RANK) for i in range(3)] == [2, RANK, RANK]
    for module in MODULES:
        kept = [cut(adapters[0], 2), adapters[1]]
        norms = [np.linalg.norm(product(a, module)) for a in kept]
        expected = norms[1] / sum(norms) * adapters[1][f"{module}.lora_B.weight"][:, 2:]
        np.testing.assert_allclose(new.params[f"{module}.lora_B.weight"][:, 2:], expected)


def test_hetloras_regulariser_is_in_the_loss():
    rule = find_rule(AlgorithmConfig(name="hetlora", options={"gamma": 0.5, "strength": 0.3}))
    adapter = draw(5)
    parameters = {n: torch.nn.Parameter(torch.from_numpy(v)) for n, v in adapter.items()}
    drift = DriftCorrection(parameters, rule.local_terms({"params": adapter}, {}), 0.1)
    expected = 0.3 * sum(
        np.linalg.norm(adapter[f"{m}.lora_B.weight"][:, 2:])
        * np.linalg.norm(adapter[f"{m}.lora_A.weight"][2:])
        for m in MODULES
    )
    assert drift.penalty().item() == pytest.approx(expected, rel=1e-12)


def test_dittos_personal_adapter_is_pulled_towards_the_global_one():
    """v <- v - lr (h (v - t) + lambda (v - w)), from the v of before, on h/2 ||v - t||^2."""
    rule = find_rule(AlgorithmConfig(name="ditto", options={"pull": 0.7}))
    w, v, t = ({"q": np.full(3, x, np.float32)} for x in (1.0, -2.0, 5.0))
    assert rule.personal_terms({"params": w}, {}).start is w
    terms = rule.personal_terms({"params": w}, {"personal": v})
    weight = torch.nn.Parameter(torch.from_numpy(terms.start["q"].copy()))
    drift = DriftCorrection({"q": weight}, terms, 0.1)
    optimizer, expected = torch.optim.SGD([weight], lr=0.1), v["q"].astype(np.float64)
    for _ in range(5):
        optimizer.zero_grad()
        (0.5 * 3.0 * (weight - 5.0).square().sum()).backward()
        drift.on_pre_optimizer_step(SimpleNamespace(fp16=False), None, None)
        optimizer.step()
        expected = expected - 0.1 * (3.0 * (expected - t["q"]) + 0.7 * (expected - w["q"]))
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5)


def test_fedsa_shares_a_and_keeps_b():
    rule = find_rule(AlgorithmConfig(name="fedsa"))
    w, own = draw(1), draw(2)
    start = rule.local_terms({"params": w}, {"adapter": own}).start
    for name, value in start.items():
        assert value is (own if "lora_B" in name else w)[name]
        assert rule.shares(name, 1) is ("lora_A" in name)
    state = step("fedsa", ServerState(0, w), clients(1))
    for name, value in state.params.items():
        mean = sum(p * a[name] for p, a in zip(SHARES, clients(1), strict=True))
        np.testing.assert_allclose(value, mean if "lora_A" in name else w[name], atol=1e-12)


@pytest.mark.parametrize("rank", [RANK, 6])
def test_fed_sb_moves_w_by_the_gradient_in_the_leading_singular_vectors(rank):
    """With whole matrices, on F_i = ||W - T_i||^2 / 2: the SVD of the mean gradient G at W = 0, of
    `rank`, by subspace iteration from A; then W_i <- W_i - lr s^2 B B' (W_i - T_i) A' A, averaged.
    """
    rng, scale, rate, seeded = np.random.default_rng(0), 2.0, 0.05, draw(99)
    left = {m: rng.normal(size=(rows, rank)) for m, (rows, _) in MODULES.items()}
    targets = [
        {m: left[m] @ rng.normal(size=(rank, columns)) for m, (_, columns) in MODULES.items()}
        for _ in SIZES
    ]
    rule = find_rule(AlgorithmConfig(name="fed_sb"))
    state = ServerState(0, {n: 0 * v if "lora_B" in n else v for n, v in seeded.items()})
    state = rule.start(state, 3)
    names = {m: [f"{m}.lora_{x}.weight" for x in "ARB"] for m in MODULES}

    def gradients(params, target):
        """Of A, R and B at s B R A."""
        found = {}
        for module, (a, r, b) in names.items():
            w = scale * params[b] @ params[r] @ params[a]
            g = scale * (w - target[module])
            found[a] = (params[b] @ params[r]).T @ g
            found[r] = params[b].T @ g @ params[a].T
            found[b] = g @ (params[r] @ params[a]).T
        return found

    for _ in range(2):
        sent = [
            {n: state.params[n] + g for n, g in gradients(state.params, t).items()} for t in targets
        ]
        state = step("fed_sb", state, sent)
    onto = {}
    for module, (a, r, b) in names.items():
        mean = -sum(p * t[module] for p, t in zip(SHARES, targets, strict=True))
        q = np.linalg.qr(mean @ seeded[a].T)[0]
        u, _, v = np.linalg.svd(q.T @ mean, full_matrices=False)
        expected = (q @ u @ (q @ u).T, v.T @ v)
        onto[module] = state.params[b] @ state.params[b].T, state.params[a].T @ state.params[a]
        for ours, theirs in zip(onto[module], expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=0.02)  # rounded to bfloat16
        if rank == RANK:  # then nothing of it is lost
            lost = onto[module][0] @ mean @ onto[module][1] - mean
            assert np.linalg.norm(lost) < 0.02 * np.linalg.norm(mean)
        assert not state.params[r].any()
    whole = {m: np.zeros(shape) for m, shape in MODULES.items()}
    for _ in range(3):
        adapters, moved = [], []
        for target in targets:
            own, w = dict(state.params), dict(whole)
            for _ in range(4):
                found = gradients(own, target)
                own = {n: v - rate * found[n] if "lora_R" in n else v for n, v in own.items()}
                for module, (b_b, a_a) in onto.items():
                    w[module] = (
                        w[module] - rate * scale**2 * b_b @ (w[module] - target[module]) @ a_a
                    )
            adapters.append(own)
            moved.append(w)
        state = step("fed_sb", state, adapters)
        whole = {m: sum(p * w[m] for p, w in zip(SHARES, moved, strict=True)) for m in MODULES}
        assert_products(state.adapter, {m: w / scale for m, w in whole.items()}, 1e-6)
        assert aggregation_error([folded(a) for a in adapters], SHARES, {}, state.adapter) < 1e-7


def test_peft_combines_alike():
    """add_weighted_adapter: cat is FLoRA's stack, svd is FlexLoRA's cut."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for module, (rows, columns) in MODULES.items():
                setattr(self, module[-1], torch.nn.Linear(columns, rows, bias=False))

    adapters, names = clients(1, RANKS), ["c0", "c1", "c2"]
    model = None
    for name, rank, adapter in zip(names, RANKS, adapters, strict=True):
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q", "v"])
        if model is None:
            model = get_peft_model(Model(), settings, adapter_name=name)
        else:
            model.add_adapter(name, settings)
        for module in MODULES:
            layer = getattr(model.base_model.model, module[-1])
            for factor in ("lora_A", "lora_B"):
                weight = torch.from_numpy(adapter[f"{module}.{factor}.weight"]).float()
                getattr(layer, factor)[name].weight.data = weight
    model.base_model.add_weighted_adapter(names, SHARES, "cat", combination_type="cat")
    model.base_model.add_weighted_adapter(
        names, SHARES, "svd", combination_type="svd", svd_rank=RANK
    )
    flora = step("flora", ServerState(0, draw(99)), adapters).tensors["frozen"]
    flexlora = step("flexlora", ServerState(0, draw(99)), adapters).params
    for module in MODULES:
        layer = getattr(model.base_model.model, module[-1])
        for ours, theirs in ((flora, "cat"), (flexlora, "svd")):
            expected = layer.get_delta_weight(theirs).detach().numpy()
            np.testing.assert_allclose(2 * product(ours, module), expected, atol=2e-5)


def test_norms_and_errors_are_those_of_whole_matrices():
    adapters, after = clients(1, RANKS), draw(7)
    whole = {m: mean_product(adapters, m) for m in MODULES}
    size = np.sqrt(sum(np.sum(w**2) for w in whole.values()))
    away = np.sqrt(sum(np.sum((w - product(after, m)) ** 2) for m, w in whole.items()))
    squares = module_norms(stacked(adapters, SHARES)).values()
    assert sum(squares) == pytest.approx(size**2, rel=1e-12)
    assert aggregation_error(adapters, SHARES, {}, after) == pytest.approx(away / size, rel=1e-12)
    zero = {n: 0 * v for n, v in after.items()}
    assert aggregation_error([zero], [1.0], {}, zero) is None


STACKING = ("lora_fair", "fedex", "flora", "flexlora", "hetlora")
seeds = st.integers(0, 2**32)


def whole(state):
    return {module: product(state.adapter, module) for module in MODULES}


@pytest.mark.parametrize("name", STACKING)
@settings(max_examples=15, deadline=None)
@given(seed=seeds, order=st.permutations(range(3)))
def test_order_of_clients_does_not_matter(name, seed, order):
    adapters = [draw([seed, i]) for i in range(3)]
    state = ServerState(0, draw([seed, 9]))
    one = step(name, state, adapters)
    other = step(name, state, [adapters[i] for i in order], [SHARES[i] for i in order])
    assert_products(other.adapter, whole(one), 1e-8)


@pytest.mark.parametrize("name", ["flora", "flexlora", "hetlora"])
@settings(max_examples=15, deadline=None)
@given(seed=seeds, factor=st.floats(0.01, 100))
def test_products_scale_with_those_of_the_clients(name, seed, factor):
    adapters, state = [draw([seed, i], RANKS[i]) for i in range(3)], ServerState(0, draw([seed, 9]))
    larger = [{n: v * factor if "lora_B" in n else v for n, v in a.items()} for a in adapters]
    expected = {m: factor * v for m, v in whole(step(name, state, adapters)).items()}
    assert_products(step(name, state, larger).adapter, expected, 1e-9 * max(1, factor))


@pytest.mark.parametrize("name", ["flora", "flexlora", "hetlora", "fedex"])
@settings(max_examples=15, deadline=None)
@given(seed=seeds, rank=st.integers(1, RANK))
def test_equal_clients_are_one_client(name, seed, rank):
    rank = RANK if name == "fedex" else rank
    adapter, state = draw([seed, 0], rank), ServerState(0, draw([seed, 9]))
    new = step(name, state, [adapter] * 3)
    assert_products(new.adapter, {m: product(adapter, m) for m in MODULES}, 1e-6)  # in float32


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_flexlora_at_full_rank_is_exact(seed):
    adapters = [draw([seed, i]) for i in range(3)]
    full = min(min(shape) for shape in MODULES.values())
    new = step("flexlora", ServerState(0, draw([seed, 9], full)), [draw([seed, 0], 3)], [1.0])
    assert rank_of(new.params) == full
    new = step("flexlora", new, [*adapters[:1], draw([seed, 5], 2)], [0.4, 0.6])
    expected = {
        m: 0.4 * product(adapters[0], m) + 0.6 * product(draw([seed, 5], 2), m) for m in MODULES
    }
    assert_products(new.params, expected, 1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_a_cut_to_the_needed_rank_loses_nothing(seed):
    adapter = stacked([draw([seed, 0], 1), draw([seed, 0], 1)], [0.25, 0.75])  # rank 2 in form
    found = truncated(adapter, 5)
    assert rank_of(found) == 1
    assert_products(found, {m: product(adapter, m) for m in MODULES}, 1e-9)


@pytest.mark.parametrize(
    ("settings_of_rule", "said"),
    [
        ({"name": "flora", "variant": "openfedllm"}, "algorithm.variant=openfedllm"),
        ({"name": "flora", "eta": 0.5}, "algorithm.eta=0.5 has no effect with algorithm=flora"),
        ({"name": "flora", "options": {"max_rank": 0}}, "max_rank must be >= 1"),
        ({"name": "lora_fair", "options": {"strength": 0.0}}, "use algorithm=fedavg"),
        ({"name": "scaffold", "factors": "b"}, "algorithm.factors=b does not work with"),
        ({"name": "fedadam", "factors": "alternate"}, "which takes b or both"),
    ],
)
def test_what_a_rule_cannot_do_is_said(settings_of_rule, said):
    with pytest.raises(ConfigError, match=said):
        find_rule(AlgorithmConfig(**settings_of_rule))
