"""Scores against loops that take one example, or one label, at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm_flwr.config import Config
from fedllm_flwr.data.choices import EncodedChoices, encode_choices, one_begins_another
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.models.generation import Decoding, generate
from fedllm_flwr.models.inputs import by_length
from fedllm_flwr.models.scoring import Question, score, score_examples
from toy_pairs import one_by_one, random_pairs

STORIES = Path(__file__).parents[3] / "shared/data/models/stories260k"
needs_stories = pytest.mark.skipif(
    not (STORIES / "config.json").is_file(), reason="no stories260k here"
)
MakeConfig = Callable[..., Config]
MakeExamples = Callable[..., Encoded]


@torch.no_grad()
def log_probabilities(model: AdaptedModel, tokens: np.ndarray) -> torch.Tensor:
    """log p(next token | tokens so far), shape (length, vocabulary), of one sequence alone."""
    model.peft.eval()
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    return model.peft(input_ids=ids).logits[0].double().log_softmax(-1)


def with_adapter(model: AdaptedModel) -> AdaptedModel:
    """The model with a random adapter of some effect."""
    rng = np.random.default_rng(1)
    model.load({n: rng.normal(0, 0.2, v.shape) for n, v in model.initial.items()})
    return model


@pytest.fixture
def model(make_config: MakeConfig) -> AdaptedModel:
    return with_adapter(load_model(make_config()))


def likelihoods(model: AdaptedModel, choices: EncodedChoices, batch_tokens: int) -> np.ndarray:
    questions = [*map(Question, choices.prompts, choices.answers)]
    found = score(model, questions, batch_tokens)
    return np.array([[answer.log_prob for answer in some] for some in found])


def naive_token_scores(model: AdaptedModel, examples: Encoded) -> tuple[int, float, int]:
    count, nll, correct = 0, 0.0, 0
    for i in range(len(examples)):
        tokens, supervised = examples[i]
        scores = log_probabilities(model, tokens)
        for t in range(1, len(tokens)):
            if supervised[t]:
                count += 1
                nll -= float(scores[t - 1, tokens[t]])
                correct += int(scores[t - 1].argmax()) == int(tokens[t])
    return count, nll, correct


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_token_scores_equal_a_loop_over_examples(
    batch_tokens: int, model: AdaptedModel, random_examples: MakeExamples
) -> None:
    examples = random_examples(25)
    scores = score_examples(model, examples, batch_tokens)
    count, nll, correct = naive_token_scores(model, examples)
    assert (scores.num_tokens.sum(), scores.num_correct.sum()) == (count, correct)
    assert scores.loss == pytest.approx(nll / count, abs=1e-5)
    assert scores.token_accuracy == correct / count


@pytest.mark.parametrize("batch_tokens", [1, 90, 100_000])
def test_log_probs_of_answers_equal_one_row_at_a_time(
    batch_tokens: int, model: AdaptedModel
) -> None:
    pairs = random_pairs(20)
    values = score_examples(model, pairs.rows, batch_tokens).log_probs.reshape(-1, 2)
    np.testing.assert_allclose(values, one_by_one(model.peft, pairs), atol=1e-4)


def test_models_that_compute_all_logits_score_the_same(
    model: AdaptedModel, random_examples: MakeExamples
) -> None:
    examples, choices = random_examples(25), random_choices([5, 9, 9], [1, 2, 4])
    some, expected = score_examples(model, examples, 100), likelihoods(model, choices, 100)
    model.selects_logits = False
    try:
        all_logits = score_examples(model, examples, 100)
        np.testing.assert_allclose(likelihoods(model, choices, 100), expected, atol=1e-5)
    finally:
        del model.selects_logits
    np.testing.assert_allclose(all_logits.log_probs, some.log_probs, rtol=1e-6)
    assert all_logits.num_tokens.tolist() == some.num_tokens.tolist()
    assert all_logits.num_correct.tolist() == some.num_correct.tolist()


def test_models_that_take_no_positions_get_prompts_of_one_length_together(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding on the left would shift their tokens."""
    choices = random_choices([1, 8, 30, 8, 8, 17], [1, 3])
    monkeypatch.setattr(model, "takes_positions", False)
    scores = likelihoods(model, choices, 4096)
    np.testing.assert_allclose(scores, naive_choice_scores(model, choices), atol=1e-4, rtol=1e-5)


def random_choices(prompts: list[int], answers: list[int], seed: int = 0) -> EncodedChoices:
    """Random tokens: a prompt per length, with one answer per length in `answers`."""
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> Any:
        return rng.integers(0, 256, length).astype(np.int32)

    rows = [[tokens(length) for length in answers] for _ in prompts]
    return EncodedChoices([tokens(length) for length in prompts], rows)


def naive_choice_scores(model: AdaptedModel, choices: EncodedChoices) -> np.ndarray:
    rows = []
    for prompt, answers in zip(choices.prompts, choices.answers, strict=True):
        row = []
        for answer in answers:
            scores = log_probabilities(model, np.concatenate([prompt, answer]))
            places = range(len(prompt), len(prompt) + len(answer))
            row.append(sum(float(scores[t - 1, answer[t - len(prompt)]]) for t in places))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
@pytest.mark.parametrize("answers", [[1, 1], [1, 3, 6], [4, 4], [2]], ids=str)
def test_choice_scores_equal_scoring_each_label_alone(
    answers: list[int], batch_tokens: int, model: AdaptedModel
) -> None:
    choices = random_choices([1, 8, 30, 8, 8, 17, 500], answers)
    scores = likelihoods(model, choices, batch_tokens)
    np.testing.assert_allclose(scores, naive_choice_scores(model, choices), atol=1e-4, rtol=1e-5)


def test_labels_of_several_answer_lengths_in_one_batch(model: AdaptedModel) -> None:
    """Labels tokenise differently after different prompts."""
    one, other = random_choices([8, 8], [1, 3]), random_choices([8], [5, 2], seed=7)
    choices = EncodedChoices([*one.prompts, *other.prompts], [*one.answers, *other.answers])
    scores = likelihoods(model, choices, 4096)
    np.testing.assert_allclose(scores, naive_choice_scores(model, choices), atol=1e-4, rtol=1e-5)


def test_nothing_to_score(model: AdaptedModel, random_examples: MakeExamples) -> None:
    nothing = random_examples(2).take(np.empty(0, np.int64))
    scores = score_examples(model, nothing, 100)
    assert (scores.loss, scores.token_accuracy) == (0.0, 0.0)
    assert score(model, [], 100) == []


def test_what_greedy_decoding_would_write(model: AdaptedModel) -> None:
    prompts = random_choices([17, 5, 30], []).prompts
    written = generate(model, prompts, Decoding(3))
    others = [np.where(np.arange(3) == 2, answer + 1, answer) for answer in written]
    questions = [
        Question(p, [a, b, a[:1]]) for p, a, b in zip(prompts, written, others, strict=True)
    ]
    for some in score(model, questions, 4096):
        assert [answer.is_greedy for answer in some] == [True, False, True]


def test_scoring_leaves_the_adapter_trainable(
    model: AdaptedModel, random_examples: MakeExamples
) -> None:
    score_examples(model, random_examples(4), 100)
    loss = model.peft(input_ids=torch.arange(9)[None]).logits.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.trainable().values())
    model.peft.zero_grad()


@needs_stories
@pytest.mark.parametrize("max_length", [512, 60])
def test_real_labels_of_several_tokens(make_config: MakeConfig, max_length: int) -> None:
    config = make_config(model={"path": str(STORIES)})
    model = with_adapter(load_model(config))
    labels = ["negative", "neutral", "positive", "no"]
    conversations = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "neutral"}]
        for text in ("Tom was happy.", "The dog ran away and was sad. " * 6, "One day it rained.")
    ]
    choices = encode_choices(conversations, labels, model.tokenizer, "alpaca", max_length)
    assert len({len(answer) for answer in choices.answers[0]}) > 1
    scores = likelihoods(model, choices, 256)
    expected = naive_choice_scores(model, choices)
    np.testing.assert_allclose(scores, expected, atol=1e-3, rtol=1e-5)


def test_batches_hold_every_example_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 200)
    batches = list(by_length(lengths, 300))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(len(batch) * lengths[batch].max() <= 300 for batch in batches)
    assert len(batches) < 1.3 * lengths.sum() / 300 + 1


def test_a_label_that_begins_another_is_not_always_chosen(model: AdaptedModel) -> None:
    """Whole answers are scored, up to their EOS; a part of one could never be the less likely."""
    labels = ["n", *(f"n{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    conversations = [
        [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "n"}]
        for i in range(10)
    ]
    choices = encode_choices(conversations, labels, model.tokenizer, "alpaca", 512)
    eos = model.tokenizer.eos_token_id
    assert all(answer[-1] == eos for answers in choices.answers for answer in answers)
    bare = EncodedChoices(choices.prompts, [[a[:-1] for a in row] for row in choices.answers])
    assert set(likelihoods(model, bare, 4096).argmax(1)) == {0}  # whatever the model

    base = model.peft.get_base_model()
    with torch.no_grad():  # a model that does not end after "n", but as before after "na"
        text = np.concatenate([choices.prompts[0], bare.answers[0][1]]).astype(np.int64)
        after_n, after_na = base.model(torch.from_numpy(text[None]))[0][0, -2:]
        away = after_n - after_na * (after_n @ after_na) / (after_na @ after_na)
        base.lm_head.weight[eos] -= 20 * away / (away @ after_n)
    scores = likelihoods(model, choices, 4096)
    np.testing.assert_allclose(scores, naive_choice_scores(model, choices), atol=1e-3, rtol=1e-5)
    assert (scores.argmax(1) > 0).any()


@pytest.mark.parametrize(
    ("labels", "begins"),
    [
        (["no", "yes", "no effect"], True),
        (["negative", "neutral", "positive"], False),
        (["a", "b", "c", "d"], False),
        (["nob", "no effect", "no"], True),
        (["no", "no"], False),
        (["1", "12", "2"], True),
    ],
)
def test_labels_that_begin_others(labels: list[str], begins: bool) -> None:
    assert one_begins_another(labels) is begins
    assert any(a != b and b.startswith(a) for a in labels for b in labels) is begins
