"""Scores of preference pairs against slow formulas, and answers against one prompt at a time."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedllm_flwr.client.local_evaluation import evaluate_locally
from fedllm_flwr.config import Config, changed
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.data.templates import render_prompt
from fedllm_flwr.errors import DataError
from fedllm_flwr.federation.messages import Assignment
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.models.generation import as_text
from fedllm_flwr.params import Params
from fedllm_flwr.tasks.dpo.held_out import (
    PreferenceSet,
    make_preference_set,
    preference_scores,
)
from fedllm_flwr.tasks.dpo.pairs import encode_pairs
from fedllm_flwr.tasks.preferences.records import Pair
from fedllm_flwr.tasks.preferences.reference import reference_log_probs
from toy_pairs import greedy, one_by_one, random_pairs

MakeConfig = Callable[..., Config]
Array = np.ndarray

QUESTIONS = ["Hi?", "What is it that you say?\nTell me all of it.", "Why so?", "Where to?", "a|b"]


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config(
        task={"name": "dpo"},
        training={"max_length": 400},
        evaluation={"batch_tokens": 700, "answers": 3, "max_new_tokens": 12},
    )


@pytest.fixture
def model(config: Config) -> AdaptedModel:
    model = load_model(config)
    model.load(random_adapter(model))
    return model


def random_adapter(model: AdaptedModel, seed: int = 1) -> Params:
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, 0.2, v.shape).astype(np.float32) for n, v in model.initial.items()}


def slow(model: AdaptedModel, prompt: Array, max_new_tokens: int) -> list[int]:
    return greedy(model.peft, prompt, max_new_tokens, int(model.tokenizer.eos_token_id))


def naive_scores(policy: Array, reference: Array, beta: float) -> dict[str, float]:
    """Pair by pair, with the standard library."""
    names = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
    logs = ("chosen_log_prob", "rejected_log_prob", "likelihood_accuracy")
    sums = dict.fromkeys((*names, *logs), 0.0)
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(
        policy.tolist(), reference.tolist(), strict=True
    ):
        better, worse = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
        sums["loss"] -= math.log(1 / (1 + math.exp(-(better - worse))))
        sums["accuracy"] += win(better, worse)
        sums["margin"] += better - worse
        sums["chosen_reward"] += better
        sums["rejected_reward"] += worse
        sums["chosen_log_prob"] += chosen
        sums["rejected_log_prob"] += rejected
        sums["likelihood_accuracy"] += win(chosen, rejected)
    return {name: value / len(policy) for name, value in sums.items()}


def win(one: float, other: float) -> float:
    return 0.5 if one == other else float(one > other)


def log_probs(count: int) -> Any:
    # Quarters: sums and differences are exact, so that a tie is a tie however it is computed.
    quarters = st.integers(-1200, 0).map(lambda n: n / 4)
    return arrays(np.float32, (count, 2), elements=quarters)


BOTH = st.integers(1, 12).flatmap(lambda n: st.tuples(log_probs(n), log_probs(n)))
BETAS = st.sampled_from([0.0625, 0.125, 0.5])  # above, the slow formula overflows
unhurried = settings(max_examples=60, deadline=None)


@unhurried
@given(BOTH, BETAS)
def test_scores_equal_a_slow_formula(both: tuple[Array, Array], beta: float) -> None:
    policy, reference = both
    expected = naive_scores(policy, reference, beta)
    found = preference_scores(policy, reference, beta)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


@unhurried
@given(BOTH, BETAS)
def test_swapped_answers_mirror_accuracy_and_margin(both: tuple[Array, Array], beta: float) -> None:
    policy, reference = both
    one = preference_scores(policy, reference, beta)
    other = preference_scores(policy[:, ::-1], reference[:, ::-1], beta)
    for name in ("accuracy", "likelihood_accuracy"):
        assert one[name] + other[name] == pytest.approx(1)
    assert one["margin"] == pytest.approx(-other["margin"])
    assert one["chosen_reward"] == pytest.approx(other["rejected_reward"])
    # -log s(m) + log s(-m) = -m
    assert one["loss"] - other["loss"] == pytest.approx(-one["margin"], abs=1e-9)


@unhurried
@given(BOTH, BETAS)
def test_the_reference_scores_itself_as_undecided(both: tuple[Array, Array], beta: float) -> None:
    scores = preference_scores(both[0], both[0], beta)
    assert (scores["accuracy"], scores["margin"]) == (0.5, 0.0)
    assert scores["loss"] == pytest.approx(math.log(2))


@unhurried
@given(BOTH, BETAS, st.permutations(range(12)))
def test_the_order_of_pairs_does_not_matter(
    both: tuple[Array, Array], beta: float, order: list[int]
) -> None:
    policy, reference = both
    moved = [i for i in order if i < len(policy)]
    one = preference_scores(policy, reference, beta)
    other = preference_scores(policy[moved], reference[moved], beta)
    assert other == pytest.approx(one, rel=1e-9, abs=1e-9)


def test_rewards_of_any_size_are_finite() -> None:
    policy, reference = np.array([[-9e4, 0.0]], np.float32), np.array([[0.0, -9e4]], np.float32)
    assert preference_scores(policy, reference, 1.0)["loss"] == pytest.approx(1.8e5)
    assert preference_scores(reference, policy, 1.0)["loss"] == 0.0


def held_out() -> tuple[list[Pair], dict[str, list[Any]]]:
    """Pairs and the same as columns of a data set; the first has more turns than one."""
    pairs = [
        Pair([{"role": "user", "content": text}], f"good {i}\nmore", f"bad {i}", "", "")
        for i, text in enumerate(QUESTIONS)
    ]
    turns = [("user", "First."), ("assistant", "Yes."), ("user", QUESTIONS[0])]
    dialogue = [{"role": role, "content": text} for role, text in turns]
    pairs[0] = pairs[0]._replace(messages=dialogue)
    names = ("messages", "chosen", "rejected")
    return pairs, {name: [getattr(pair, name) for pair in pairs] for name in names}


def make_set(config: Config, model: AdaptedModel, reference: Params | None = None) -> PreferenceSet:
    pairs, records = held_out()
    encoded = encode_pairs(pairs, model.tokenizer, config.data.template, config.training.max_length)
    return make_preference_set(config, model, records, encoded, reference)


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
def test_a_set_is_scored_against_its_reference(
    with_adapter: bool, config: Config, model: AdaptedModel
) -> None:
    reference = random_adapter(model, 2) if with_adapter else model.initial
    data = make_set(config, model, reference if with_adapter else None)
    model.load(reference)
    expected_reference = one_by_one(model.peft, data.pairs)
    model.load(random_adapter(model))
    expected = naive_scores(one_by_one(model.peft, data.pairs), expected_reference, config.dpo.beta)
    answers = [slow(model, prompt, 12) for prompt in data.prompts.tokens]
    expected["answer_tokens"] = float(np.mean([len(answer) for answer in answers]))
    assert data.score(model, 300) == pytest.approx(expected, abs=1e-4)
    model.load(reference)
    same = data.score(model, config.evaluation.batch_tokens)
    assert (same["accuracy"], same["margin"]) == (0.5, 0.0)


def test_metrics_name_scores(config: Config, model: AdaptedModel) -> None:
    data = make_set(config, model)
    assert set(data.metrics) <= set(data.score(model, 300))
    assert len(data) == len(QUESTIONS)


def test_no_answers_wanted(config: Config, model: AdaptedModel) -> None:
    config = changed(config, evaluation={"answers": 0})
    data = make_set(config, model)
    assert "answer_tokens" not in data.score(model, 300)
    assert data.prompts.side_by_side(model, model.initial) == ""


@pytest.mark.parametrize("template", ["vicuna", "alpaca"])
def test_prompts_are_those_of_training_and_leave_room(
    template: str, config: Config, model: AdaptedModel
) -> None:
    config = changed(
        config, data={"template": template}, training={"max_length": 190}, evaluation={"answers": 5}
    )
    data = make_set(config, model)
    pairs, _ = held_out()
    for prompt, pair, text in zip(data.prompts.tokens, pairs, QUESTIONS, strict=True):
        rendered = render_prompt(pair.messages, template, model.tokenizer)
        shown = model.tokenizer.decode(prompt).removeprefix("<s>")
        assert rendered.endswith(shown)
        assert text in shown
        assert len(prompt) <= 190 - 12
    assert data.prompts.texts == QUESTIONS
    assert data.prompts.chosen == [pair.chosen for pair in pairs]


def test_prompts_belong_to_the_pairs_that_were_kept(config: Config, model: AdaptedModel) -> None:
    """Pairs that were left out in encoding have no prompt, and shift no answer."""
    pairs, records = held_out()
    long = Pair([{"role": "user", "content": "x" * 500}], "yes", "no", "", "")
    pairs = [long, *pairs]
    records = {name: [getattr(pair, name) for pair in pairs] for name in records}
    encoded = encode_pairs(pairs, model.tokenizer, "vicuna", 400, "drop")
    config = changed(config, data={"template": "vicuna"})
    data = make_preference_set(config, model, records, encoded, None)
    assert data.prompts.texts == QUESTIONS[:3]
    assert data.prompts.chosen == ["good 0\nmore", "good 1\nmore", "good 2\nmore"]


def test_answers_side_by_side(config: Config, model: AdaptedModel) -> None:
    data = make_set(config, model)
    adapter = random_adapter(model)
    page = data.prompts.side_by_side(model, adapter)
    assert page.startswith("# Answers to held-out prompts\n\n## Prompt\n")
    _, *sections = page.split("\n## Prompt\n\n")
    assert len(sections) == 3
    for i, section in enumerate(sections):
        model.load(model.initial)
        base = as_text(model, np.array(slow(model, data.prompts.tokens[i], 12)))
        model.load(adapter)
        adapted = as_text(model, np.array(slow(model, data.prompts.tokens[i], 12)))
        assert base != adapted
        parts = section.strip("\n").split("\n\n")
        assert parts == [
            quoted(QUESTIONS[i]),
            "**base model**",
            quoted(base),
            "**with the adapter**",
            quoted(adapted),
            "**the better answer in the data**",
            f"> good {i}\n> more",
        ]


def quoted(text: str) -> str:
    return "\n".join("> " + line for line in text.splitlines()) or "> "


def test_clients_score_their_own_pairs(config: Config, model: AdaptedModel, tmp_path: Path) -> None:
    pairs, adapter, reference = random_pairs(9), random_adapter(model), random_adapter(model, 2)
    data = ClientData("a", random_pairs(3, seed=1), pairs)
    for given_reference in (None, reference):
        task = Assignment(
            1,
            adapter,
            0.0,
            config,
            sent={} if given_reference is None else {"reference": given_reference},
        )
        scores = evaluate_locally(task, data, tmp_path)
        model.load(adapter)
        policy = one_by_one(model.peft, pairs)
        expected_reference = reference_log_probs(model, given_reference, pairs.rows, 1).reshape(
            -1, 2
        )
        expected = naive_scores(policy, expected_reference, config.dpo.beta)
        assert scores == pytest.approx(expected, abs=1e-4)


def test_a_client_that_holds_nothing_back(
    config: Config, model: AdaptedModel, tmp_path: Path
) -> None:
    pairs = random_pairs(3)
    data = ClientData("desk-3", pairs, pairs.take(np.empty(0, np.int64)))
    with pytest.raises(DataError, match=r"^desk-3 holds no examples back; raise data\.validation"):
        evaluate_locally(Assignment(1, model.initial, 0.0, config), data, tmp_path)
