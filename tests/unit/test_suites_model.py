"""The model under evaluation: prompts, cuts and ends; answers against greedy decoding."""

from collections.abc import Callable

import numpy as np
import pytest

from fedllm_flwr.config import Config
from fedllm_flwr.data.encode import encode_prompts
from fedllm_flwr.evaluation.suites.suite_model import TextModel
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.models.generation import Decoding, as_text, generate

MakeConfig = Callable[..., Config]


@pytest.fixture
def adapted(make_config: MakeConfig) -> AdaptedModel:
    model = load_model(make_config())
    rng = np.random.default_rng(1)
    model.load({n: rng.normal(0, 0.2, v.shape) for n, v in model.initial.items()})
    return model


def test_answers_equal_greedy_decoding_whatever_the_batch(adapted: AdaptedModel) -> None:
    model = TextModel(adapted, batch_tokens=200)
    asked = ["Tom was happy.", "A dog", "What is the sentiment of this news? " * 3]
    messages = [[{"role": "user", "content": text}] for text in asked]
    tokens = encode_prompts(messages, adapted.tokenizer, "alpaca")
    expected = [as_text(adapted, generate(adapted, [t], Decoding(12))[0]) for t in tokens]

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
    text = model.render_fitting(long, room=16)

    assert model.examples_left_out > 0
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
