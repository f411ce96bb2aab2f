"""Laws that hold for any preference pair: parsing, boundaries, truncation."""

from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedllm_flwr.config.schema import ColumnsConfig
from fedllm_flwr.data.columns import Columns, Mapping
from fedllm_flwr.data.encode import encode_prompts
from fedllm_flwr.data.faults import Faults
from fedllm_flwr.data.special import has_marks
from fedllm_flwr.plugins import PREPROCESSING
from fedllm_flwr.tasks.dpo.pairs import EncodedPairs, encode_pairs
from fedllm_flwr.tasks.preferences.records import Pair, make_pairs
from toys import byte_tokenizer

SPEAKERS = ("Human", "Assistant")
ROLES = ("user", "assistant")
# White space, line ends and marks that a parser may trip over, and any other text but halves of
# surrogate pairs.
PIECES = st.sampled_from([" ", "\n", "\n\n", "\r\n", "Human:", "Assistant", ":", "</s>", "é", "a"])
TEXT = st.lists(
    PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=6
).map("".join)


def is_one_turn(text: str) -> bool:
    """Whether no paragraph of a turn starts with a speaker, and its last line is whole."""
    unix = text.replace("\r\n", "\n")
    inside = any(f"\n\n{speaker}:" in unix for speaker in SPEAKERS)
    return not inside and not text.endswith("\r")


TURNS = TEXT.filter(is_one_turn).filter(lambda text: not has_marks(text))
TEMPLATE = (
    r"{% for m in messages %}{{ '\n\nHuman: ' if m.role == 'user' else '\n\nAssistant: ' }}"
    r"{{ m.content }}{% endfor %}{{ '\n\nAssistant:' if add_generation_prompt }}"
)


def merging_tokenizer() -> Any:
    """Byte-level BPE that looks ahead in white space, with merges of white space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "a"), ("ĊĊ", "ĊĊ"), (":", "Ċ"), ("e", "e")]
    tokens = ["<end>", *alphabet, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", chat_template=TEMPLATE
    )


TOKENIZER = merging_tokenizer()
WITH_BOS = byte_tokenizer()


def transcript(turns: list[str]) -> str:
    return "".join(f"\n\n{SPEAKERS[i % 2]}: {text}" for i, text in enumerate(turns))


def parsed(chosen: str, rejected: str) -> tuple[list[Pair], Faults]:
    columns = ColumnsConfig()
    rows = list(PREPROCESSING.find("hh_rlhf")([{"chosen": chosen, "rejected": rejected}], columns))
    return make_pairs(rows, Mapping("f", columns), Columns(rows))


def messages(turns: list[str]) -> list[dict[str, str]]:
    return [{"role": ROLES[i % 2], "content": text} for i, text in enumerate(turns)]


CONTEXTS = st.lists(st.tuples(TURNS, TURNS), max_size=2).flatmap(
    lambda exchanges: TURNS.map(lambda last: [*(t for pair in exchanges for t in pair), last])
)


@st.composite
def dialogues(draw: st.DrawFn) -> Pair:
    """A context whose turns may be empty, and two answers that may share their beginning."""
    context, shared = draw(CONTEXTS), draw(TURNS)
    chosen, rejected = (f"x{shared}{draw(TEXT)}" for _ in range(2))
    assume(is_one_turn(chosen) and is_one_turn(rejected))
    assume(not has_marks(chosen + rejected))  # these are read as the text of a special token
    return Pair(messages(context), chosen, rejected, "", "")


@settings(deadline=None, max_examples=300)
@given(dialogues())
def test_dialogues_are_parsed_into_the_turns_they_were_made_of(pair: Pair) -> None:
    context = [turn["content"] for turn in pair.messages]
    pairs, faults = parsed(*(transcript([*context, answer]) for answer in pair[1:3]))

    if pair.chosen.strip() == pair.rejected.strip():
        assert (pairs, len(faults.equal)) == ([], 1)
    else:
        assert (pairs, faults) == ([pair], Faults())


@settings(deadline=None, max_examples=200)
@given(dialogues(), st.sampled_from(["alpaca", "vicuna", "chat"]))
def test_rows_share_the_prompts_own_tokens(pair: Pair, template: str) -> None:
    assume(pair.chosen != pair.rejected)
    rows = encode_pairs([pair], TOKENIZER, template, 10**6)[0]
    prompt = encode_prompts([pair.messages], TOKENIZER, template)[0]

    for (tokens, supervised), answer in zip(rows, pair[1:3], strict=True):
        np.testing.assert_array_equal(tokens[~supervised], prompt)
        assert not supervised[: len(prompt)].any()
        assert TOKENIZER.decode(tokens[supervised]) == f" {answer}<end>"


@settings(deadline=None, max_examples=200)
@given(dialogues())
def test_a_dialogue_survives_parsing_and_encoding(pair: Pair) -> None:
    """Prompt and answer together decode to the transcript, cut after its last speaker."""
    context = [turn["content"] for turn in pair.messages]
    texts = [transcript([*context, answer]) for answer in pair[1:3]]
    pairs, _ = parsed(*texts)
    assume(pairs)

    rows = encode_pairs(pairs, TOKENIZER, "chat", 10**6)[0]
    for (tokens, supervised), text in zip(rows, texts, strict=True):
        end = text.rindex("\n\nAssistant:") + len("\n\nAssistant:")
        assert TOKENIZER.decode(tokens[~supervised]) == text[:end]
        assert TOKENIZER.decode(tokens[supervised]) == f"{text[end:]}<end>"


@settings(deadline=None, max_examples=200)
@given(dialogues(), st.integers(1, 500), st.sampled_from(["right", "left", "drop"]))
def test_truncation_keeps_the_prompts_end_and_the_answers_start(
    pair: Pair, limit: int, truncation: str
) -> None:
    assume(pair.chosen != pair.rejected)
    whole = split(encode_pairs([pair], WITH_BOS, "vicuna", 10**6))
    encoded = encode_pairs([pair], WITH_BOS, "vicuna", limit, truncation)
    fits = len(whole[0]) + max(len(answer) for answer in whole[1:]) <= limit

    assert len(encoded) + encoded.report.dropped == 1
    assert len(encoded) == 1 or not fits
    if not len(encoded):
        return
    assert fits or truncation != "drop"
    prompt, *answers = split(encoded)
    assert prompt[0] == whole[0][0] == WITH_BOS.bos_token_id
    assert prompt[1:] == whole[0][len(whole[0]) - len(prompt) + 1 :]
    assert len(prompt) >= min(len(whole[0]), limit // 2)
    for answer, before in zip(answers, whole[1:], strict=True):
        assert answer == before[: limit - len(prompt)]
    longest = len(prompt) + max(len(answer) for answer in answers)
    assert longest == limit if len(prompt) < len(whole[0]) else longest <= limit
    assert answers[0] != answers[1]
    cut = len(whole[0]) - len(prompt)
    if len(whole[0]) > 8 * limit:  # a text far beyond the limit is counted without its middle
        assert 0 < encoded.report.prompt_tokens_cut <= cut
    else:
        assert encoded.report.prompt_tokens_cut == cut


def split(encoded: EncodedPairs) -> list[list[int]]:
    """Prompt, chosen and rejected answer of the first pair."""
    (chosen, better), (rejected, worse) = encoded[0]
    return [tokens.tolist() for tokens in (chosen[~better], chosen[better], rejected[worse])]


def test_a_mark_in_a_record_is_no_control_token() -> None:
    """It is read as the text of a special token; the only control token ends the answer."""
    pair = Pair(messages(["a"]), "x\U0010f000", "y", "", "")
    tokens, supervised = encode_pairs([pair], TOKENIZER, "chat", 100)[0][0]
    assert TOKENIZER.decode(tokens[supervised]) == " x<end><end>"
    assert np.flatnonzero(tokens == TOKENIZER.eos_token_id).tolist() == [len(tokens) - 1]
