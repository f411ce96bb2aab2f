"""Likelihoods against loops that take one answer at a time, answers against greedy decoding."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedllm_flwr.config import Config
from fedllm_flwr.data.encode import encode_prompts
from fedllm_flwr.evaluation.answers import as_text, greedy_answers
from fedllm_flwr.evaluation.suites.decoding import Decoding
from fedllm_flwr.evaluation.suites.likelihood import Question, score_questions
from fedllm_flwr.evaluation.suites.suite_model import TextModel
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model

MakeConfig = Callable[..., Config]


@pytest.fixture
def adapted(make_config: MakeConfig) -> AdaptedModel:
    model = load_model(make_config())
    rng = np.random.default_rng(1)
    model.load({n: rng.normal(0, 0.2, v.shape) for n, v in model.initial.items()})
    return model


@torch.no_grad()
def naive_score(model: AdaptedModel, prompt: Any, answer: Any) -> tuple[float, bool]:
    """The whole text in one pass, one token after another."""
    ids = torch.tensor([[*prompt.tolist(), *answer.tolist()]])
    log_probs = model.peft(input_ids=ids).logits[0].double().log_softmax(-1)
    total, greedy = 0.0, True
    for i, token in enumerate(answer.tolist()):
        row = log_probs[len(prompt) - 1 + i]
        total += float(row[token])
        greedy &= int(row.argmax()) == token
    return total, greedy


@pytest.mark.parametrize("batch_tokens", [1, 120, 10_000])
def test_scores_equal_a_loop(adapted: AdaptedModel, batch_tokens: int) -> None:
    rng = np.random.default_rng(0)

    def tokens(length: int) -> Any:
        return rng.integers(0, 256, length).astype(np.int32)

    shapes = [(5, [1, 1]), (30, [1, 1, 1]), (9, [2, 1]), (17, [3, 5]), (17, [1, 1]), (3, [4, 4])]
    questions = [Question(tokens(n), [tokens(k) for k in answers]) for n, answers in shapes]
    greedy = greedy_answers(adapted, [questions[3].prompt], 3)[0]
    questions[3].answers[0] = greedy

    found = score_questions(adapted, questions, batch_tokens)

    for question, scores in zip(questions, found, strict=True):
        for answer, score in zip(question.answers, scores, strict=True):
            log_prob, is_greedy = naive_score(adapted, question.prompt, answer)
            assert score.log_prob == pytest.approx(log_prob, abs=1e-4)
            assert score.is_greedy == is_greedy
    assert found[3][0].is_greedy


def test_answers_equal_greedy_decoding_whatever_the_batch(adapted: AdaptedModel) -> None:
    model = TextModel(adapted, batch_tokens=200)
    asked = ["Tom was happy.", "A dog", "What is the sentiment of this news? " * 3]
    messages = [[{"role": "user", "content": text}] for text in asked]
    tokens = encode_prompts(messages, adapted.tokenizer, "alpaca")
    expected = [as_text(adapted, greedy_answers(adapted, [t], 12)[0]) for t in tokens]

    assert model.generate([model.render(m) for m in messages], Decoding(12)) == expected


def test_a_stop_text_ends_an_answer(adapted: AdaptedModel) -> None:
    model = TextModel(adapted, prompt="raw")
    whole = model.generate(["Tom was happy."], Decoding(20))[0]
    mark = whole[4]

    cut = model.generate(["Tom was happy."], Decoding(20, stop=(mark,)))[0]

    assert cut == whole[: whole.index(mark)].strip()


def test_samples_repeat_with_their_seed(adapted: AdaptedModel) -> None:
    def sampled(seed: int) -> list[str]:
        return TextModel(adapted, seed=seed).generate(["a", "b"], Decoding(12, temperature=1.0))

    assert sampled(1) == sampled(1) != sampled(2)


EXAMPLES = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "1+1?\nAnswer:"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "1+2?\nAnswer:"},
]


def test_prompts_speak_as_the_model_was_tuned(adapted: AdaptedModel) -> None:
    joined = "Answer.\n\n1+1?\nAnswer: 2\n\n1+2?\nAnswer:"
    raw = TextModel(adapted, prompt="raw").render(EXAMPLES)
    trained = TextModel(adapted, prompt="trained", template="vicuna").render(EXAMPLES)

    assert raw == joined
    assert trained.endswith(f"USER: {joined} ASSISTANT:")


def test_examples_that_do_not_fit_are_left_out_first_ones_first(adapted: AdaptedModel) -> None:
    model = TextModel(adapted, prompt="raw")
    long = [
        EXAMPLES[0],
        *({"role": r, "content": f"{i}{c * 100}"} for i in range(8) for r, c in TURNS),
        EXAMPLES[3],
    ]
    text, left_out = model.render_fitting(long, room=16)

    assert left_out > 0
    assert "0q" not in text
    assert "7q" in text
    assert text.startswith("Answer.\n\n")
    assert text.endswith("1+2?\nAnswer:")
    assert len(adapted.tokenizer(text)["input_ids"]) <= model.max_length - 16


TURNS = (("user", "q"), ("assistant", "a"))


def test_a_prompt_that_is_too_long_is_cut_and_counted(adapted: AdaptedModel) -> None:
    model = TextModel(adapted, prompt="raw")
    model.log_likelihoods(["x" * 700, "y"], [["A", "B"], ["A", "B"]])

    assert model.cut == 1


def test_base_is_the_model_without_its_adapter(adapted: AdaptedModel) -> None:
    model = TextModel(adapted, prompt="raw")

    def score() -> float:
        return model.log_likelihoods(["a b"], [["c"]])[0][0].log_prob

    tuned = score()
    with adapted.peft.disable_adapter():
        base = score()
    adapted.load(adapted.initial)

    assert score() == pytest.approx(base, abs=1e-6)
    assert abs(tuned - base) > 1e-3


@pytest.mark.parametrize("prompt", ["raw", "trained"])
def test_answers_that_begin_others_are_scored_to_their_end(
    adapted: AdaptedModel, prompt: str
) -> None:
    """As training ends them; other answers are not, as the harness has it."""
    model = TextModel(adapted, prompt=prompt)
    eos = adapted.tokenizer.eos_token
    text = model.render([{"role": "user", "content": "Is it so?"}])
    ended, bare = model.log_likelihoods([text, text], [["no", "no way"], ["no", "yes"]])
    by_hand = model.log_likelihoods([text, text], [[f"no{eos}", "x"], [f"no way{eos}", "x"]])
    found = [score.log_prob for score in ended]
    assert found == pytest.approx([some[0].log_prob for some in by_hand], abs=1e-4)
    assert bare[0].log_prob > found[0]
