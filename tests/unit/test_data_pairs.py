"""Preference pairs as tokens: exact boundaries, and what truncation keeps."""

from typing import Any

import numpy as np
import pytest

from fedllm_flwr.data.encode import encode, encode_prompts
from fedllm_flwr.errors import ConfigError, DataError, ModelError
from fedllm_flwr.tasks.dpo.pairs import EncodedPairs, PairReport, encode_pairs
from fedllm_flwr.tasks.preferences.records import Pair
from toy_tokenizers import CHATML, PLAIN_BLANK_LINES, TOKENIZERS, byte_level

ROLES = ("user", "assistant")


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.fixture(params=["alpaca", "vicuna", "chat"])
def template(request: pytest.FixtureRequest, tokenizer: Any) -> str:
    if request.param == "chat" and not tokenizer.chat_template:
        pytest.skip("the tokenizer has no chat template")
    return str(request.param)


def pair(*contents: str, chosen: str = "yes", rejected: str = "no") -> Pair:
    messages = [{"role": ROLES[i % 2], "content": text} for i, text in enumerate(contents)]
    return Pair(messages, chosen, rejected, "", "")


def parts(encoded: EncodedPairs, index: int = 0) -> tuple[list[int], list[int], list[int]]:
    """Prompt, chosen and rejected answer; the rows must share the prompt."""
    (chosen, better), (rejected, worse) = encoded[index]
    prompt = chosen[~better].tolist()
    assert prompt == rejected[~worse].tolist()
    for supervised in (better, worse):  # the prompt comes first, the answer after it
        assert supervised.tolist() == [False] * len(prompt) + [True] * int(supervised.sum())
    return prompt, chosen[better].tolist(), rejected[worse].tolist()


ANSWERS = [
    ("yes", "no"),
    ("I think so", "I think not"),
    ("a", "ab"),
    ("\n\nlines", "  spaces"),
    ("你好 🌍", "你好 🌑"),
    ("é", "e\u0301"),
    (" a ", "\ta"),
    (":\n", "plain"),
]


@pytest.mark.parametrize(("chosen", "rejected"), ANSWERS)
@pytest.mark.parametrize("contents", [("Grüße: what\nis it? ",), ("q", "a:", "r\n"), ("q", "", "")])
def test_boundaries(
    contents: tuple[str, ...], chosen: str, rejected: str, template: str, tokenizer: Any
) -> None:
    record = pair(*contents, chosen=chosen, rejected=rejected)

    encoded = encode_pairs([record], tokenizer, template, 10_000)
    prompt, *answers = parts(encoded)
    alone = encode_prompts([record.messages], tokenizer, template)[0]
    assert prompt == alone.tolist()
    for tokens, text in zip(answers, (chosen, rejected), strict=True):
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokens.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == text.strip()


def test_answers_are_those_of_instruction_tuning(template: str, tokenizer: Any) -> None:
    """One exchange has the tokens that the same conversation has for task=sft."""
    record = pair("What is it?", chosen="It is a\ntest.", rejected="What?")

    rows = encode_pairs([record], tokenizer, template, 10_000)[0]
    for (tokens, supervised), answer in zip(rows, (record.chosen, record.rejected), strict=True):
        messages = [*record.messages, {"role": "assistant", "content": answer}]
        expected, marks = encode([messages], tokenizer, template, 10_000)[0]
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_array_equal(supervised, marks)


def test_prompt_is_kept_where_the_tokenizer_would_merge_or_look_ahead() -> None:
    """One of the answers changes GPT-2's tokens of the white space before it, and only one."""
    tokenizer = byte_level(PLAIN_BLANK_LINES, eos="<|endoftext|>")
    record = pair("q", "r", "s", chosen="\n\nlines", rejected="plain")

    prompt, chosen, rejected = parts(encode_pairs([record], tokenizer, "chat", 1000))
    text = tokenizer.decode(prompt)
    assert tokenizer(text)["input_ids"] == prompt
    whole = [
        tokenizer(text + tokenizer.decode(answer))["input_ids"] for answer in (chosen, rejected)
    ]
    assert any(tokens[: len(prompt)] != prompt for tokens in whole)  # else this shows nothing
    assert (tokenizer.decode(chosen), tokenizer.decode(rejected)) == (
        "\n\nlines<|endoftext|>",
        "plain<|endoftext|>",
    )


def test_chat_template_that_rewrites_earlier_turns_is_fine() -> None:
    """Only the last answer has to extend its prompt: reasoning models shorten earlier ones."""
    forgetful = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else '...' }}")
    earlier = "{% for m in messages %}{{ m.content if m.role == 'user' or loop.last else '' }}|"
    tokenizer = byte_level(earlier + "{% endfor %}")
    prompt, chosen, _ = parts(encode_pairs([pair("a", "b", "c")], tokenizer, "chat", 100))

    assert (tokenizer.decode(prompt), tokenizer.decode(chosen)) == ("a||c|", "yes|<|im_end|>")
    with pytest.raises(ModelError, match="does not extend its own prompt"):
        encode_pairs([pair("a")], byte_level(forgetful), "chat", 100)


def cut(record: Pair, tokenizer: Any, max_length: int, **options: Any) -> EncodedPairs:
    return encode_pairs([record], tokenizer, "alpaca", max_length, **options)


LONG = pair("word " * 30, chosen="ends well", rejected="bad")


@pytest.mark.parametrize("truncation", ["right", "left"])
def test_a_long_prompt_loses_its_start(truncation: str, tokenizer: Any) -> None:
    prompt, chosen, rejected = parts(cut(LONG, tokenizer, 10_000))
    bos = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
    room = len(prompt) - 5

    encoded = cut(LONG, tokenizer, room + len(chosen), truncation=truncation)
    kept = [*bos, *prompt[len(prompt) - room + len(bos) :]]
    assert len(kept) == room
    assert parts(encoded) == (kept, chosen, rejected)
    assert encoded.report == PairReport(1, 1, 1, 5, 0, 0)
    assert encoded.lengths.tolist() == [room + len(chosen)]


def test_a_long_answer_loses_its_end_and_the_prompt_keeps_half() -> None:
    tokenizer = byte_level()
    record = pair("word " * 30, chosen="a" * 300, rejected="b" * 20)
    prompt, chosen, rejected = parts(cut(record, tokenizer, 10_000))

    encoded = cut(record, tokenizer, 100)
    assert parts(encoded) == (prompt[-50:], chosen[:50], rejected)
    assert encoded.report == PairReport(1, 1, 1, len(prompt) - 50, 1, 0)
    assert encoded.rows.report.truncated == 2


def test_a_short_prompt_stays_whole_and_leaves_the_rest_to_the_answers() -> None:
    tokenizer = byte_level(CHATML)
    record = pair("hi", chosen="a" * 300, rejected="b" * 300)
    prompt, chosen, rejected = parts(encode_pairs([record], tokenizer, "chat", 10_000))

    encoded = encode_pairs([record], tokenizer, "chat", 100)
    assert len(prompt) < 50
    room = 100 - len(prompt)
    assert parts(encoded) == (prompt, chosen[:room], rejected[:room])
    assert encoded.report == PairReport(1, 1, 0, 0, 2, 0)


def test_what_just_fits_is_not_cut(tokenizer: Any) -> None:
    whole = cut(LONG, tokenizer, 10_000)

    encoded = cut(LONG, tokenizer, int(whole.lengths[0]), truncation="drop")
    assert parts(encoded) == parts(whole)
    assert encoded.report == PairReport(1, 1, 0, 0, 0, 0)


def test_answers_that_are_equal_after_the_cut_are_left_out() -> None:
    same_start = pair("q", chosen="a" * 300 + "b", rejected="a" * 300 + "c")
    records = [pair("q"), same_start, pair("r")]

    encoded = encode_pairs(records, byte_level(), "chat", 100)
    assert encoded.source.tolist() == [0, 2]
    assert encoded.report == PairReport(3, 2, 0, 0, 0, 1)
    assert encoded.report.summary.endswith("0 answers cut, 1 left out")


def test_truncation_drop_leaves_long_pairs_out(tokenizer: Any) -> None:
    whole = int(cut(LONG, tokenizer, 10_000).lengths[0])
    short = pair("hi", chosen="a", rejected="b")

    encoded = encode_pairs([LONG, short, LONG], tokenizer, "alpaca", whole - 1, "drop")
    assert encoded.source.tolist() == [1]
    assert encoded.report == PairReport(3, 1, 0, 0, 0, 2)


@pytest.mark.parametrize("max_length", range(1, 8))
def test_tiny_limits_are_kept(max_length: int, tokenizer: Any) -> None:
    encoded = cut(LONG, tokenizer, max_length)

    assert (encoded.lengths <= max_length).all()
    assert len(encoded) + encoded.report.dropped == 1
    if len(encoded):
        prompt, chosen, rejected = parts(encoded)
        assert prompt
        assert chosen != rejected


def test_losses_are_told() -> None:
    tokenizer = byte_level()
    short, endless = pair("hi"), pair("hi", chosen="a" * 999)
    whole = encode_pairs([LONG], tokenizer, "chat", 10_000)
    assert whole.report.summary == ""

    limit = int(whole.lengths[0]) - 7
    cut_down = encode_pairs([short, LONG, endless], tokenizer, "chat", limit)
    assert cut_down.report.summary == (
        "1 of 3 pairs lost the start of their prompt (7 tokens in all), 1 answers cut, 0 left out"
    )


def test_pairs_are_a_sequence_of_two_rows() -> None:
    records = [pair(f"q{i}", chosen="a" * (i + 1), rejected="b" * (9 - 2 * i)) for i in range(4)]

    encoded = encode_pairs(records, byte_level(), "vicuna", 1000)
    assert len(encoded) == 4
    sizes = [[len(tokens) for tokens, _ in encoded[i]] for i in range(4)]
    assert encoded.lengths.tolist() == [max(size) for size in sizes]
    assert encoded.num_tokens_of(np.array([3, 1])) == sum(sizes[3]) + sum(sizes[1])
    assert encoded.rows.num_tokens_of(np.array([0, 7])) == sizes[0][0] + sizes[3][1]
    flat = [tokens for i in range(4) for tokens, _ in encoded[i]]
    np.testing.assert_array_equal(np.concatenate(flat), encoded.tokens)
    taken = encoded.take(np.array([2, 0]))
    assert [parts(taken, i) for i in (0, 1)] == [parts(encoded, i) for i in (2, 0)]
    assert parts(encoded, -1) == parts(encoded, 3)
    assert taken.source.tolist() == [2, 0]
    assert taken.report == PairReport(2, 2, 0, 0, 0, 0)
    for index in (4, -5):
        with pytest.raises(IndexError):
            encoded[index]
    nothing = encode_pairs([], byte_level(), "vicuna", 1000)
    assert (len(nothing), nothing.lengths.tolist(), nothing.source.tolist()) == (0, [], [])
    assert len(encoded.take(np.array([], np.int64))) == 0


def test_errors() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.truncation=middle; use one of: right, left, drop"
    ):
        encode_pairs([], byte_level(), "vicuna", 10, "middle")
    with pytest.raises(ConfigError, match=r"data\.template=vicunna"):
        encode_pairs([pair("q")], byte_level(), "vicunna", 10)
    with pytest.raises(DataError, match="must end with a user turn"):
        encode_pairs([pair("q", "a")], byte_level(), "vicuna", 10)
    with pytest.raises(ModelError, match="no chat template"):
        encode_pairs([pair("q")], byte_level(None), "chat", 10)
    without_end = byte_level()
    without_end.eos_token = None
    with pytest.raises(ModelError, match="no eos_token"):
        encode_pairs([pair("q")], without_end, "vicuna", 10)
