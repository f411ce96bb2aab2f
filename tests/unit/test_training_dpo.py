"""The loss of a round of DPO by formula, and what training leaves of the model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedllm_flwr.client.local_round import train_locally
from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.schema import DPO_LOSSES
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.federation.messages import Assignment, Update
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.params import Params
from fedllm_flwr.tasks.dpo.pairs import EncodedPairs
from fedllm_flwr.tasks.dpo.training import train_dpo
from fedllm_flwr.training.batches import round_batches
from fedllm_flwr.training.schedule import draw_examples
from fedllm_flwr.training.trainer import Trained
from toy_pairs import random_pairs

MakeConfig = Callable[..., Config]
Vector = np.ndarray
NUM_PAIRS = 8


@pytest.fixture(scope="module")
def pairs() -> EncodedPairs:
    return random_pairs(NUM_PAIRS)


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config(
        task={"name": "dpo"},
        lora={"dropout": 0.0},
        dpo={"beta": 0.3},
        training={"max_steps": 1, "batch_size": NUM_PAIRS, "max_grad_norm": 0.5},
    )


@pytest.fixture
def model(config: Config) -> AdaptedModel:
    model = load_model(config)
    model.load(random_adapter(model))
    return model


def random_adapter(model: AdaptedModel) -> Params:
    rng = np.random.default_rng(1)
    return {n: rng.normal(0, 0.2, v.shape).astype(np.float32) for n, v in model.initial.items()}


def train(
    config: Config, model: AdaptedModel, pairs: EncodedPairs, reference: Vector, size: int = 2
) -> Trained:
    given = reference.astype(np.float32)
    batches = round_batches(np.arange(NUM_PAIRS), pairs.lengths, 1, size, packed=False)
    return train_dpo(model, pairs, given, batches, config.dpo, config.training, 1e-2, 0, [])


def near(policy: Vector, seed: int = 3) -> Vector:
    """Reference values on both sides of the policy's, so that rewards have either sign."""
    return policy + np.random.default_rng(seed).normal(0, 4, policy.shape)


@torch.no_grad()
def one_by_one(model: AdaptedModel, pairs: EncodedPairs) -> tuple[Vector, Vector]:
    """log p of both answers, each row alone, and their lengths in tokens, each (pairs, 2)."""
    model.peft.eval()
    values, lengths = np.zeros((len(pairs), 2)), np.zeros((len(pairs), 2))
    for i in range(len(pairs)):
        for side, (tokens, supervised) in enumerate(pairs[i]):
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            scores = model.peft(input_ids=ids).logits[0].double().log_softmax(-1)
            places = [t for t in range(1, len(tokens)) if supervised[t]]
            values[i, side] = sum(float(scores[t - 1, tokens[t]]) for t in places)
            lengths[i, side] = len(places)
    return values, lengths


def log_sigmoid(x: Vector) -> Vector:
    return np.log(1 / (1 + np.exp(-x)))


def sigmoid_loss(h: Vector, ratios: Vector, beta: float, eps: float) -> Vector:
    """Rafailov et al. 2023, equation 7; h is the difference of the log-ratios."""
    return -log_sigmoid(beta * h)


def hinge_loss(h: Vector, ratios: Vector, beta: float, eps: float) -> Vector:
    """Zhao et al. 2023 (SLiC), normalised by the reference: max(0, 1 - beta h)."""
    return np.maximum(0, 1 - beta * h)


def robust_loss(h: Vector, ratios: Vector, beta: float, eps: float) -> Vector:
    """Chowdhury et al. 2024, equation 11: unbiased where a share eps of the labels is flipped."""
    kept, flipped = -log_sigmoid(beta * h), -log_sigmoid(-beta * h)
    return ((1 - eps) * kept - eps * flipped) / (1 - 2 * eps)


def ipo_loss(h: Vector, ratios: Vector, beta: float, eps: float) -> Vector:
    """Azar et al. 2023, equation 17, of log-ratios per token."""
    return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * beta)) ** 2


FORMULAS = {
    "sigmoid": (sigmoid_loss, 0.0),
    "hinge": (hinge_loss, 0.0),
    "robust": (robust_loss, 0.2),
    "ipo": (ipo_loss, 0.0),
}


@pytest.mark.parametrize("loss_type", FORMULAS)
@pytest.mark.parametrize("size", [2, NUM_PAIRS])
def test_loss_by_formula(
    loss_type: str, size: int, config: Config, model: AdaptedModel, pairs: EncodedPairs
) -> None:
    formula, eps = FORMULAS[loss_type]
    config = changed(config, dpo={"loss_type": loss_type, "label_smoothing": eps})
    policy, lengths = one_by_one(model, pairs)
    reference = near(policy)
    ratios = policy - reference
    per_pair = formula(ratios[:, 0] - ratios[:, 1], ratios / lengths, config.dpo.beta, eps)

    trained = train(config, model, pairs, reference, size)
    assert trained.steps == 1
    assert trained.loss == pytest.approx(per_pair.mean(), rel=1e-5)
    margins = config.dpo.beta * (ratios[:, 0] - ratios[:, 1])
    assert trained.metrics["margin"] == pytest.approx(margins.mean(), rel=1e-5)
    assert trained.metrics["accuracy"] == (margins > 0).mean()
    assert 0 < (margins > 0).mean() < 1


def test_sft_term_by_formula(config: Config, model: AdaptedModel, pairs: EncodedPairs) -> None:
    """The chosen answers' mean negative log-likelihood per token, of the whole micro-batch."""
    config = changed(config, dpo={"sft_weight": 0.3})
    policy, lengths = one_by_one(model, pairs)
    reference = near(policy)
    ratios = policy - reference
    preference = sigmoid_loss(ratios[:, 0] - ratios[:, 1], ratios, config.dpo.beta, 0.0).mean()
    nll = -policy[:, 0].sum() / lengths[:, 0].sum()
    trained = train(config, model, pairs, reference, NUM_PAIRS)
    assert trained.loss == pytest.approx(preference + 0.3 * nll, rel=1e-5)


def round_of(config: Config, pairs: EncodedPairs, folder: Path) -> Update:
    params = random_adapter(load_model(config))
    task = Assignment(1, params, 1e-2, config)
    return train_locally(task, ClientData("a", pairs, pairs), folder)


def assert_near(one: Params, other: Params) -> None:
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=0, atol=2e-5, err_msg=name)


def test_equal_rewards_count_half(config: Config, model: AdaptedModel, pairs: EncodedPairs) -> None:
    """As in evaluation: the share of a tie is neither right nor wrong."""
    chosen_twice = pairs.rows.take(np.repeat(np.arange(0, 2 * NUM_PAIRS, 2), 2))
    twice = EncodedPairs(chosen_twice, pairs.report)
    reference = np.zeros((NUM_PAIRS, 2), np.float32)
    reference[0] = [-5, 5]  # one pair whose reference prefers the worse answer: a clear margin
    trained = train(config, model, twice, reference, NUM_PAIRS)
    assert trained.metrics["accuracy"] == (1 + 0.5 * (NUM_PAIRS - 1)) / NUM_PAIRS


@pytest.mark.parametrize("loss_type", FORMULAS)
def test_a_step_does_not_depend_on_its_division(
    loss_type: str, config: Config, tmp_path: Path
) -> None:
    """Also where micro-batches are of unlike sizes, as those of pairs of unlike lengths are."""
    config = changed(
        config,
        dpo={"loss_type": loss_type, "label_smoothing": FORMULAS[loss_type][1]},
        training={"max_steps": 3},
    )
    pairs = random_pairs(30)
    whole, *parts = (
        round_of(with_micro_batches(config, size), pairs, tmp_path / str(size))
        for size in (NUM_PAIRS, 4, 2, 1)
    )
    for part in parts:
        assert_near(part.delta, whole.delta)
        for name in ("loss", "margin", "accuracy"):
            assert part.metrics[name] == pytest.approx(whole.metrics[name], abs=1e-5)
    assert max(np.abs(value).max() for value in whole.delta.values()) > 1e-3


def with_micro_batches(config: Config, size: int) -> Config:
    return replace(config, training=replace(config.training, micro_batch_size=size))


def test_micro_batches_are_of_unlike_sizes(config: Config) -> None:
    """What the test above relies on."""
    drawn = draw_examples(30, 3 * NUM_PAIRS, 0, config.seed, "a")
    batches = round_batches(drawn, random_pairs(30).lengths, 3, 2, packed=False).batches
    assert len({len(batch) for batch in batches}) > 1


def test_logits_of_all_positions_train_the_same(
    config: Config, model: AdaptedModel, pairs: EncodedPairs
) -> None:
    """Architectures that cannot compute logits at chosen positions only."""
    start, reference = model.params(), near(one_by_one(model, pairs)[0])
    trained, params = train(config, model, pairs, reference), model.params()
    model.load(start)
    model.selects_logits = False
    try:
        other = train(config, model, pairs, reference)
    finally:
        del model.selects_logits
    assert other.loss == pytest.approx(trained.loss, rel=1e-6)
    assert_near(model.params(), params)


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_every_loss_that_the_configuration_offers_trains(
    loss_type: str, config: Config, model: AdaptedModel, pairs: EncodedPairs
) -> None:
    config = changed(
        config,
        dpo={"loss_type": loss_type, "label_smoothing": 0.1 if loss_type == "exo_pair" else 0.0},
    )
    start, policy = model.params(), one_by_one(model, pairs)[0]
    trained = train(config, model, pairs, near(policy))
    assert np.isfinite(trained.loss)
    assert max(np.abs(value - start[name]).max() for name, value in model.params().items()) > 1e-3


class _Noted(nn.Module):
    """Notes the dropout probabilities at each forward pass, and whether modules train."""

    def __init__(self, model: AdaptedModel) -> None:
        super().__init__()
        self.seen: set[tuple[float, bool]] = set()
        dropouts = [m for m in model.peft.modules() if isinstance(m, nn.Dropout)]
        assert dropouts
        for module in dropouts:
            module.register_forward_pre_hook(self._note)

    def _note(self, module: Any, args: Any) -> None:
        self.seen.add((module.p, module.training))


@pytest.mark.parametrize(("disable", "p"), [(True, 0.0), (False, 0.3)])
def test_dropout_is_off_while_training_and_back_afterwards(
    disable: bool, p: float, make_config: MakeConfig, config: Config, pairs: EncodedPairs
) -> None:
    config = replace(config, lora=make_config(lora={"dropout": 0.3}).lora)
    config = changed(config, dpo={"disable_dropout": disable})
    model = load_model(config)
    noted = _Noted(model)
    train(config, model, pairs, np.full((NUM_PAIRS, 2), -30.0))
    assert noted.seen == {(p, True)}
    assert {m.p for m in model.peft.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_dropout_is_back_after_a_failure(
    make_config: MakeConfig, config: Config, pairs: EncodedPairs
) -> None:
    config = replace(config, lora=make_config(lora={"dropout": 0.3}).lora)
    model = load_model(config)
    with pytest.raises(IndexError):
        train(config, model, pairs, np.full((2, 2), -30.0))
    assert {m.p for m in model.peft.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_nothing_of_trl_stays_in_the_model(
    config: Config, model: AdaptedModel, pairs: EncodedPairs
) -> None:
    """No patched forward, no adapter named ref, no other pad token: SFT may follow."""
    base = model.peft.get_base_model()
    before = (base.forward.__func__, set(model.peft.peft_config), base.config.pad_token_id)
    train(config, model, pairs, np.full((NUM_PAIRS, 2), -30.0))
    after = (base.forward.__func__, set(model.peft.peft_config), base.config.pad_token_id)
    assert after == before
    assert "forward" not in vars(model.peft)


def test_what_a_round_reports(config: Config, tmp_path: Path) -> None:
    """Tokens are those of both rows of a pair; a pair that is drawn twice counts once."""
    pairs = random_pairs(6)
    update = round_of(config, pairs, tmp_path)
    twice = np.concatenate([np.arange(6), draw_examples(6, NUM_PAIRS, 0, config.seed, "a")[6:]])
    expected = sum(len(tokens) for i in twice for tokens, _ in pairs[int(i)])
    metrics = update.metrics
    assert (update.num_examples, metrics["steps"]) == (6, 1.0)
    assert metrics["tokens"] == expected
    assert expected <= metrics["computed_tokens"] <= 2 * expected
    assert set(metrics) >= {"loss", "accuracy", "margin", "seconds"}


def test_the_same_task_gives_the_same_bits(config: Config, tmp_path: Path) -> None:
    """With the reference computed anew, and with that of the round before."""
    pairs = random_pairs(20)
    first = round_of(config, pairs, tmp_path / "one")
    torch.manual_seed(99)
    for folder in ("one", "two"):
        again = round_of(config, pairs, tmp_path / folder)
        for name, value in first.delta.items():
            assert value.tobytes() == again.delta[name].tobytes()
