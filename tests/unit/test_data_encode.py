"""Exact boundaries between prompts and answers, on three kinds of tokenizer."""

from typing import Any

import numpy as np
import pytest

from fedllm_flwr.data.choices import encode_choices
from fedllm_flwr.data.encode import encode, encode_prompts
from fedllm_flwr.data.templates import Segment, render, render_prompt
from fedllm_flwr.data.tokens import tokenise
from fedllm_flwr.errors import ConfigError, DataError, ModelError
from toy_tokenizers import LLAMA2, PLAIN_BLANK_LINES, TOKENIZERS, byte_level, sentence_piece


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


ANSWERS = [
    "positive",
    " positive",
    "\nA list:\n- 你好 🌍",
    "\n\n\n  code",
    "é" * 3,
    "a ",
    "\t",
    ":\n",
]
EOS = "<|im_end|>"


def text_of(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def test_alpaca_text() -> None:
    segments = render(chat("Name it.", "Bob"), "alpaca", byte_level())

    assert segments == [
        Segment(
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nName it. \n\n### Response:",
            False,
        ),
        Segment(f" Bob{EOS}", True),
    ]


def test_vicuna_text_of_several_turns_and_a_system_message() -> None:
    several = render(chat("{a}", "b", "c", "d"), "vicuna", byte_level())
    preamble = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    )
    expected = f"{preamble} USER: {{a}} ASSISTANT: b{EOS}USER: c ASSISTANT: d{EOS}"

    assert text_of(several) == expected
    assert [part.text for part in several if part.supervised] == [f" b{EOS}", f" d{EOS}"]
    own = render(chat("a", "b", system="Be brief."), "vicuna", byte_level())
    assert text_of(own) == f"Be brief. USER: a ASSISTANT: b{EOS}"


def test_chat_template_with_eos_at_the_end_of_a_turn() -> None:
    segments = render(chat("a", "b", "c", "d", system="s"), "chat", byte_level())

    assert segments == [
        Segment(
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
            "<|im_start|>assistant\n",
            False,
        ),
        Segment("b<|im_end|>", True),
        Segment("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", False),
        Segment("d<|im_end|>", True),
    ]


def test_chat_template_without_eos_gets_one_at_the_end() -> None:
    segments = render(chat("a", "b", "c", "d"), "chat", byte_level(eos="<|endoftext|>"))

    assert [part.text for part in segments if part.supervised] == [
        "b<|im_end|>\n",
        "d<|im_end|>\n<|endoftext|>",
    ]


def test_space_after_a_chat_prompt_belongs_to_the_answer() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"  # noqa: E501

    segments = render(chat("a", "b"), "chat", byte_level(template))
    assert segments == [Segment("user: a\nassistant:", False), Segment(f" b\n{EOS}", True)]
    assert render_prompt(chat("a"), "chat", byte_level(template)) == segments[0].text


@pytest.mark.parametrize("template", ["alpaca", "vicuna", "chat"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_prompt_is_the_text_before_the_answer(template: str, answer: str, tokenizer: Any) -> None:
    if template == "chat" and not tokenizer.chat_template:
        pytest.skip("the tokenizer has no chat template")
    messages = chat("first ", "x", "then", answer)

    segments = render(messages, template, tokenizer)
    assert render_prompt(messages[:-1], template, tokenizer) == text_of(segments[:-1])
    assert render_prompt(messages[:1], template, tokenizer) == segments[0].text


@pytest.mark.parametrize("template", ["alpaca", "vicuna", "chat"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_boundary_eos_and_bos(template: str, answer: str, tokenizer: Any) -> None:
    if template == "chat" and not tokenizer.chat_template:
        pytest.skip("the tokenizer has no chat template")
    messages = chat("Grüße, 你好: what\nis it? ", answer)

    tokens, supervised = encode([messages], tokenizer, template, 10_000)[0]
    prompt = encode_prompts([messages[:-1]], tokenizer, template)[0]
    np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
    assert not supervised[: len(prompt)].any()
    assert supervised[len(prompt) :].all()
    assert tokens[-1] == tokenizer.eos_token_id
    assert (tokens == tokenizer.eos_token_id).sum() == 1 + (prompt == tokenizer.eos_token_id).sum()
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        assert tokens[0] == tokenizer.bos_token_id
        assert (tokens == tokenizer.bos_token_id).sum() == 1
    decoded = tokenizer.decode(tokens[supervised], skip_special_tokens=True)
    assert decoded.strip() == answer.strip()


@pytest.mark.parametrize("template", ["alpaca", "vicuna", "chat"])
def test_every_answer_of_a_conversation_is_supervised(template: str, tokenizer: Any) -> None:
    if template == "chat" and not tokenizer.chat_template:
        pytest.skip("the tokenizer has no chat template")
    messages = chat("one", "yes: 你好", "two", "\n- no", "three", " maybe")

    tokens, supervised = encode([messages], tokenizer, template, 10_000)[0]
    starts = np.flatnonzero(np.diff(supervised.astype(int)) == 1) + 1
    ends = [*(np.flatnonzero(np.diff(supervised.astype(int)) == -1) + 1), len(tokens)]
    assert len(starts) == len(ends) == 3
    answers = [
        tokenizer.decode(tokens[start:end], skip_special_tokens=True).strip()
        for start, end in zip(starts, ends, strict=True)
    ]
    assert answers == ["yes: 你好", "- no", "maybe"]
    assert all(tokens[end - 1] == tokenizer.eos_token_id for end in ends)


def test_whole_text_is_tokenised_as_a_user_of_the_model_would(tokenizer: Any) -> None:
    messages = chat("What is it?", "It is a\ntest.")

    tokens, _ = encode([messages], tokenizer, "alpaca", 10_000)[0]
    text = text_of(render(messages, "alpaca", tokenizer))
    assert tokens.tolist() == tokenizer(text)["input_ids"]


def test_bos_in_the_chat_template_is_not_doubled() -> None:
    tokenizer = sentence_piece(LLAMA2)

    tokens, _ = encode([chat("a", "b")], tokenizer, "chat", 100)[0]
    text = text_of(render(chat("a", "b"), "chat", tokenizer))
    assert text.startswith("<s>[INST]")
    assert (tokens == 1).tolist() == [True] + [False] * (len(tokens) - 1)


def test_prompt_is_kept_where_the_tokenizer_would_merge_or_look_ahead() -> None:
    """White space after the prompt's own changes GPT-2's tokens of both."""
    tokenizer = byte_level(PLAIN_BLANK_LINES, eos="<|endoftext|>")
    prompt = encode_prompts([chat("q")], tokenizer, "chat")[0]
    changed = 0

    for answer in ("plain", "\nline", "\n\nlines", "  spaces"):
        segments = render(chat("q", answer), "chat", tokenizer)
        whole = tokenizer(text_of(segments))["input_ids"]
        changed += whole[: len(prompt)] != prompt.tolist()
        ((tokens, supervised),) = tokenise([segments], tokenizer)
        np.testing.assert_array_equal(tokens[~supervised], prompt)
        assert tokenizer.decode(tokens) == text_of(segments)
    assert changed >= 2  # else this test shows nothing


def test_merge_across_a_boundary_without_white_space() -> None:
    tokenizer = sentence_piece()
    parts = [Segment("is it:", False), Segment("\nyes</s>", True)]  # ":\n" is one token

    ((tokens, supervised),) = tokenise([parts], tokenizer)
    np.testing.assert_array_equal(tokens[~supervised], tokenizer("is it:")["input_ids"])
    assert tokenizer.decode(tokens[supervised]).endswith("\nyes</s>")


LONG = chat("word " * 30, "ends well")


def lengths(tokenizer: Any) -> tuple[int, int]:
    """Tokens of the whole example LONG, and of its answer."""
    tokens, supervised = encode([LONG], tokenizer, "alpaca", 10_000)[0]
    return len(tokens), int(supervised.sum())


def test_truncation_right_cuts_the_answer_and_drops_what_is_only_prompt(tokenizer: Any) -> None:
    whole, answer = lengths(tokenizer)

    cut = encode([LONG], tokenizer, "alpaca", whole - 1, "right")
    assert (cut.report.truncated, cut.report.num_supervised) == (1, answer - 1)
    gone = encode([LONG, chat("a", "b")], tokenizer, "alpaca", whole - answer, "right")
    assert (gone.report.dropped, gone.source.tolist()) == (1, [1])


def test_truncation_left_keeps_bos_and_the_whole_answer(tokenizer: Any) -> None:
    whole, answer = lengths(tokenizer)
    full, _ = encode([LONG], tokenizer, "alpaca", whole, "left")[0]
    num_bos = int(full[0] == tokenizer.bos_token_id)

    for room in (whole - 1, answer + num_bos + 1, answer + num_bos):
        tokens, supervised = encode([LONG], tokenizer, "alpaca", room, "left")[0]
        expected = np.concatenate([full[:num_bos], full[len(full) - room + num_bos :]])
        np.testing.assert_array_equal(tokens, expected)
        assert supervised.sum() == answer
    tokens, supervised = encode([LONG], tokenizer, "alpaca", answer + num_bos - 1, "left")[0]
    np.testing.assert_array_equal(tokens[num_bos:], full[-answer:-1])
    assert supervised[num_bos:].all()


def test_truncation_left_keeps_the_last_answer_and_unmarks_half_of_an_earlier_one() -> None:
    tokenizer = byte_level()
    messages = chat("q", "abcdefghij", "r", "ok")
    full, marks = encode([messages], tokenizer, "vicuna", 1000)[0]
    first_answer = np.flatnonzero(marks)[0]

    room = len(full) - int(first_answer) - 3
    tokens, supervised = encode([messages], tokenizer, "vicuna", room, "left")[0]
    np.testing.assert_array_equal(tokens, full[-room:])
    assert tokenizer.decode(tokens[supervised]) == f" ok{EOS}"


def test_truncation_drop_leaves_long_records_out(tokenizer: Any) -> None:
    whole, _ = lengths(tokenizer)

    encoded = encode([LONG, chat("a", "b"), LONG], tokenizer, "alpaca", whole - 1, "drop")
    assert encoded.source.tolist() == [1]
    assert (encoded.report.num_records, encoded.report.dropped) == (3, 2)
    assert encoded.report.truncated == 0
    assert encode([LONG], tokenizer, "alpaca", whole, "drop").report.num_examples == 1


def test_losses_are_told() -> None:
    assert encode([LONG], byte_level(), "alpaca", 10_000).report.summary == ""
    told = encode([LONG], byte_level(), "alpaca", 10).report.summary
    assert told == "0 of 1 records cut, 1 left out"


def test_encoded_is_a_sequence_of_flat_arrays() -> None:
    conversations = [chat("a", "b"), chat("c", "d e f"), chat("g", "h")]

    encoded = encode(conversations, byte_level(), "vicuna", 1000)
    assert len(encoded) == 3
    assert encoded.lengths.tolist() == [len(encoded[i][0]) for i in range(3)]
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in encoded]), encoded.tokens)
    np.testing.assert_array_equal(encoded[-1][0], encoded[2][0])
    assert (encoded.tokens.dtype, encoded.offsets.dtype) == (np.int32, np.int64)
    assert encoded.report.num_tokens == encoded.offsets[-1] == len(encoded.supervised)
    with pytest.raises(IndexError):
        encoded[3]
    assert len(encode([], byte_level(), "vicuna", 1000)) == 0


def test_prompts_are_cut_at_their_start_after_the_bos(tokenizer: Any) -> None:
    full = encode_prompts([LONG[:1]], tokenizer, "alpaca")[0]
    num_bos = int(full[0] == tokenizer.bos_token_id)

    cut = encode_prompts([LONG[:1]], tokenizer, "alpaca", max_length=9)[0]
    np.testing.assert_array_equal(cut, [*full[:num_bos], *full[len(full) - 9 + num_bos :]])


@pytest.mark.parametrize("template", ["alpaca", "vicuna", "chat"])
@pytest.mark.parametrize("more", [[], ["neutral indeed"]], ids=["apart", "one begins another"])
def test_choices_are_the_tokens_of_training(template: str, more: list[str], tokenizer: Any) -> None:
    """Without the EOS, unless a label would end where another one goes on."""
    if template == "chat" and not tokenizer.chat_template:
        pytest.skip("the tokenizer has no chat template")
    labels = ["negative", "neutral", *more, "positive"]
    conversations = [chat("How is it?", "neutral"), chat("a", "b", "And now? ", "positive")]

    choices = encode_choices(conversations, labels, tokenizer, template, 1000)
    assert len(choices) == 2
    for i, messages in enumerate(conversations):
        for label, answer in zip(labels, choices.answers[i], strict=True):
            example = chat(*[m["content"] for m in messages[:-1]], label)
            trained, _ = encode([example], tokenizer, template, 1000)[0]
            joined = np.concatenate([choices.prompts[i], answer])
            np.testing.assert_array_equal(trained[: len(joined)], joined)
            text = tokenizer.decode(answer, skip_special_tokens=True)
            assert text.strip() == label
            assert (answer[-1] == tokenizer.eos_token_id) == bool(more)
            assert bool(more) == (len(joined) == len(trained))


def test_choices_cut_long_prompts_and_need_labels() -> None:
    tokenizer = byte_level()

    choices = encode_choices([LONG], ["a", "b"], tokenizer, "alpaca", 20)
    longest = max(map(len, choices.answers[0]))
    assert len(choices.prompts[0]) + longest == 20
    with pytest.raises(ConfigError, match=r"data\.labels is empty"):
        encode_choices([LONG], [], tokenizer, "alpaca", 20)
    with pytest.raises(ConfigError, match=r"training\.max_length=1 leaves no room"):
        encode_choices([LONG], ["a"], tokenizer, "alpaca", 1)


def test_errors_of_templates_and_tokenizers() -> None:
    messages = chat("a", "b")
    with pytest.raises(ConfigError, match=r"data\.template=alpacca is unknown; choose one of"):
        encode([messages], byte_level(), "alpacca", 10)
    with pytest.raises(ConfigError, match=r"data\.truncation=middle; use one of: right, left, dro"):
        encode([messages], byte_level(), "alpaca", 10, "middle")
    with pytest.raises(ModelError, match=r"no chat template; set data\.template=alpaca or vicuna"):
        encode([messages], byte_level(None), "chat", 10)
    with pytest.raises(ModelError, match="the tokenizer has no eos_token"):
        encode([messages], byte_level(eos=None), "alpaca", 10)
    with pytest.raises(DataError, match="must end with an assistant turn"):
        render(messages[:1], "alpaca", byte_level())
    with pytest.raises(DataError, match="a prompt must end with a user turn"):
        render_prompt(messages, "alpaca", byte_level())


def test_errors_of_chat_templates() -> None:
    rewriting = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match=r"does not extend its own prompt \(turn 2\)"):
        render(chat("a", "b"), "chat", byte_level(rewriting))
    refusing = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(
        DataError, match=r"refuses a conversation of system, user \(System role not supported\)"
    ):
        render(chat("a", "b", system="s"), "chat", byte_level(refusing))
