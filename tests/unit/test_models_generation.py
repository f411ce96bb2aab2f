"""Answers, batched, against greedy decoding of one row at a time without padding."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedllm_flwr.config import Config
from fedllm_flwr.data.encode import encode_prompts
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.models.generation import Decoding, as_text, generate
from toy_pairs import greedy

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


def prompts(count: int, model: AdaptedModel) -> list[Array]:
    messages = [[{"role": "user", "content": text}] for text in QUESTIONS[:count]]
    return encode_prompts(messages, model.tokenizer, "vicuna", 400)


def test_answers_together_equal_one_at_a_time(model: AdaptedModel) -> None:
    """Prompts of several lengths, padded on the left, with a cache, against plain argmax."""
    asked = prompts(5, model)
    assert len({len(prompt) for prompt in asked}) > 2
    together = generate(model, asked, Decoding(12))
    assert [answer.tolist() for answer in together] == [slow(model, p, 12) for p in asked]
    alone = [generate(model, [prompt], Decoding(12))[0].tolist() for prompt in asked]
    assert [answer.tolist() for answer in together] == alone


def test_answers_end_with_eos(model: AdaptedModel) -> None:
    """Each answer at its own EOS: the one that this model reaches after some tokens."""
    asked = prompts(5, model)
    answers = generate(model, asked, Decoding(12))
    tokenizer = model.tokenizer
    before = tokenizer.eos_token_id, tokenizer.eos_token
    middle = int(answers[0][3])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(middle)
    try:
        cut = generate(model, asked, Decoding(12))
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
    together = generate(model, asked, Decoding(20))
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
    """Greedy is greedy, whatever the model's authors published."""
    asked = prompts(3, model)
    expected = [slow(model, prompt, 12) for prompt in asked]
    base = model.peft.get_base_model()
    plain = base.generation_config
    base.generation_config = type(plain)(**published)
    try:
        answers = generate(model, asked, Decoding(12))
        assert base.generation_config.to_diff_dict() == type(plain)(**published).to_diff_dict()
    finally:
        base.generation_config = plain
    assert [answer.tolist() for answer in answers] == expected


def test_sampled_answers_do_not_depend_on_their_batch(model: AdaptedModel) -> None:
    asked = prompts(5, model) * 2  # a question asked twice gets two answers
    decoding = Decoding(12, temperature=1.0, top_p=0.9, seed=3)
    together = [answer.tolist() for answer in generate(model, asked, decoding)]
    assert [answer.tolist() for answer in generate(model, asked, decoding, 450)] == together
    assert together[:5] != together[5:]
    other = generate(model, asked, Decoding(12, temperature=1.0, top_p=0.9, seed=4))
    assert [answer.tolist() for answer in other] != together


def test_a_small_nucleus_holds_the_most_likely_token_alone(model: AdaptedModel) -> None:
    asked = prompts(3, model)
    sampled = generate(model, asked, Decoding(12, temperature=1.0, top_p=1e-6))
    assert [answer.tolist() for answer in sampled] == [slow(model, p, 12) for p in asked]


def test_rows_of_one_batch_have_temperatures_and_seeds_of_their_own(model: AdaptedModel) -> None:
    asked = prompts(3, model)[:1] * 4
    answers = generate(
        model, asked, Decoding(12), temperatures=[0.0, 1.0, 1.0, 1.0], seeds=[1, 2, 3, 2]
    )
    greedy_one, drawn, other, again = [answer.tolist() for answer in answers]
    assert greedy_one == slow(model, asked[0], 12)
    assert drawn == again != other
