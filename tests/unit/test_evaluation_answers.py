"""Log-probabilities and greedy answers, batched, against one row at a time without padding."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedllm_flwr.config import Config
from fedllm_flwr.data.encode import encode_prompts
from fedllm_flwr.evaluation.answers import as_text, greedy_answers
from fedllm_flwr.evaluation.suites.decoding import Decoding, write_answers
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.training.log_probs import answer_log_probs
from toy_pairs import greedy, one_by_one, random_pairs

MakeConfig = Callable[..., Config]
Array = np.ndarray
QUESTIONS = ["Hi?", "What is it that you say?\nTell me all of it.", "Why so?", "Where to?", "a|b"]
STORIES = Path(__file__).parents[3] / "shared/data/models/stories260k"


@pytest.fixture
def model(make_config: MakeConfig) -> AdaptedModel:
    """The toy model with a random adapter of some effect."""
    model = load_model(make_config())
    rng = np.random.default_rng(1)
    model.load({n: rng.normal(0, 0.2, v.shape) for n, v in model.initial.items()})
    return model


def slow(model: AdaptedModel, prompt: Array, max_new_tokens: int) -> list[int]:
    return greedy(model.peft, prompt, max_new_tokens, int(model.tokenizer.eos_token_id))


@pytest.mark.parametrize("batch_tokens", [1, 90, 100_000])
def test_log_probs_of_answers_equal_one_row_at_a_time(
    batch_tokens: int, model: AdaptedModel
) -> None:
    pairs = random_pairs(20)
    values = answer_log_probs(model, pairs.rows, batch_tokens).reshape(-1, 2)
    np.testing.assert_allclose(values, one_by_one(model.peft, pairs), atol=1e-4)


def test_log_probs_by_models_that_compute_all_logits(model: AdaptedModel) -> None:
    pairs = random_pairs(20)
    model.selects_logits = False
    try:
        values = answer_log_probs(model, pairs.rows, 300).reshape(-1, 2)
    finally:
        del model.selects_logits
    np.testing.assert_allclose(values, one_by_one(model.peft, pairs), atol=1e-4)


def prompts(count: int, model: AdaptedModel) -> list[Array]:
    messages = [[{"role": "user", "content": text}] for text in QUESTIONS[:count]]
    return encode_prompts(messages, model.tokenizer, "vicuna", 400)


def test_answers_together_equal_one_at_a_time(model: AdaptedModel) -> None:
    """Prompts of several lengths, padded on the left, with a cache, against plain argmax."""
    asked = prompts(5, model)
    assert len({len(prompt) for prompt in asked}) > 2
    together = greedy_answers(model, asked, 12)
    assert [answer.tolist() for answer in together] == [slow(model, p, 12) for p in asked]
    alone = [greedy_answers(model, [prompt], 12)[0].tolist() for prompt in asked]
    assert [answer.tolist() for answer in together] == alone


def test_answers_end_with_eos(model: AdaptedModel) -> None:
    """Each answer at its own EOS: the one that this model reaches after some tokens."""
    asked = prompts(5, model)
    answers = greedy_answers(model, asked, 12)
    tokenizer = model.tokenizer
    before = tokenizer.eos_token_id, tokenizer.eos_token
    middle = int(answers[0][3])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(middle)
    try:
        cut = greedy_answers(model, asked, 12)
    finally:
        tokenizer.eos_token = before[1]
    assert len(cut[0]) <= 4
    for whole, part in zip(answers, cut, strict=True):
        ends = np.flatnonzero(whole == middle)
        expected = whole[: ends[0] + 1] if len(ends) else whole
        assert part.tolist() == expected.tolist()


@pytest.mark.skipif(not (STORIES / "config.json").is_file(), reason="no stories260k here")
def test_answers_of_a_real_model(make_config: MakeConfig) -> None:
    model = load_model(make_config(model={"path": str(STORIES)}))
    texts = ["Once upon a time", "Tom was", "The little dog ran to the big tree and"]
    asked = [np.array(model.tokenizer(text)["input_ids"], np.int32) for text in texts]
    together = greedy_answers(model, asked, 20)
    assert [answer.tolist() for answer in together] == [slow(model, p, 20) for p in asked]
    assert len(as_text(model, together[0]).split()) > 5


@pytest.mark.parametrize(
    "published",
    [
        {"repetition_penalty": 8.0},
        {"forced_eos_token_id": 5, "forced_bos_token_id": 7},
        {"do_sample": True, "temperature": 3.0, "top_k": 50},
        {"no_repeat_ngram_size": 1, "min_new_tokens": 9},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_base_model_s_generation_config_is_not_obeyed(
    published: dict[str, object], model: AdaptedModel
) -> None:
    """Greedy is greedy, by both ways of writing answers, whatever the model's authors published."""
    asked = prompts(3, model)
    expected = [slow(model, prompt, 12) for prompt in asked]
    base = model.peft.get_base_model()
    plain = base.generation_config
    base.generation_config = type(plain)(**published)
    try:
        answers = greedy_answers(model, asked, 12)
        texts = write_answers(model, asked, Decoding(12), 100_000, seed=0)
        assert base.generation_config.to_diff_dict() == type(plain)(**published).to_diff_dict()
    finally:
        base.generation_config = plain
    assert [answer.tolist() for answer in answers] == expected
    decode = model.tokenizer.decode
    assert texts == [decode(answer, skip_special_tokens=True) for answer in expected]
