"""Special tokens written out in records are text; those of a template are control tokens."""

from typing import Any

import pytest

from fedllm_flwr.data.encode import encode, encode_prompts
from fedllm_flwr.tasks.dpo.pairs import encode_pairs
from fedllm_flwr.tasks.preferences.records import Pair
from toy_tokenizers import TOKENIZERS

TEMPLATES = ("alpaca", "vicuna", "chat")


def special(tokenizer: Any) -> dict[str, int]:
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if token.special}


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def control_tokens(tokenizer: Any, tokens: Any) -> list[int]:
    ids = set(special(tokenizer).values())
    return [int(token) for token in tokens if int(token) in ids]


def cases() -> list[Any]:
    return [pytest.param(name, t, id=f"{name}-{t}") for name in TOKENIZERS for t in TEMPLATES]


def usable(name: str, template: str) -> Any:
    tokenizer = TOKENIZERS[name]()
    if template == "chat" and not tokenizer.chat_template:
        pytest.skip("no chat template")
    return tokenizer


@pytest.mark.parametrize(("name", "template"), cases())
def test_written_out_in_a_record_it_is_text(name: str, template: str) -> None:
    """The control tokens of a hostile record are those of a harmless one, and its text is whole."""
    tokenizer = usable(name, template)
    for literal in special(tokenizer):
        prompt, answer = f"Name{literal} it {literal}.", f"no{literal} and {literal} yes"
        hostile = encode([turns(prompt, answer)], tokenizer, template, 4096)
        harmless = encode([turns("Name it .", "no and yes")], tokenizer, template, 4096)
        found = control_tokens(tokenizer, hostile.tokens)
        expected = control_tokens(tokenizer, harmless.tokens)
        unknown = tokenizer.unk_token_id
        assert [t for t in found if t != unknown] == [t for t in expected if t != unknown]
        supervised = hostile.tokens[hostile.supervised].tolist()
        assert tokenizer.decode(supervised[:-1]).strip().replace(" ", "").startswith("no")
        if unknown not in found:  # the tokenizer can spell it
            text = tokenizer.decode(supervised, skip_special_tokens=True)
            assert literal in text
            assert text.replace(" ", "").count(literal.replace(" ", "")) == 2


@pytest.mark.parametrize(("name", "template"), cases())
def test_the_prompt_before_an_answer_is_the_prompt_to_generate_from(
    name: str, template: str
) -> None:
    tokenizer = usable(name, template)
    for literal in special(tokenizer):
        messages = turns(f"Name {literal} it{literal}", f"yes {literal}")
        (prompt,) = encode_prompts([messages[:1]], tokenizer, template)
        tokens, supervised = encode([messages], tokenizer, template, 4096)[0]
        assert tokens[~supervised][: len(prompt)].tolist() == prompt.tolist()


@pytest.mark.parametrize(("name", "template"), cases())
def test_records_without_them_keep_their_tokens(name: str, template: str) -> None:
    """The exchanged copy of the tokenizer gives the same tokens as the tokenizer itself."""
    from fedllm_flwr.data.special import PlainTokenizer
    from fedllm_flwr.data.templates import render

    tokenizer = usable(name, template)
    plain = PlainTokenizer(tokenizer)
    for text in ("Grüße, 你好", "  spaces\n\n\n and  lines\n", "a", ""):
        parts = render(turns(text, text), template, tokenizer)
        whole = "".join(part.text for part in parts)
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert plain([plain.exchange(whole)]).encodings[0].ids == ids


def test_pairs_too(request: pytest.FixtureRequest) -> None:
    tokenizer = TOKENIZERS["byte_level"]()
    eos = tokenizer.eos_token
    pairs = [Pair(turns("a", "b")[:1], f"good{eos}", f"bad{eos} x", "", "")]
    encoded = encode_pairs(pairs, tokenizer, "alpaca", 512)
    (chosen, better), (rejected, worse) = encoded[0]
    for tokens, answer in ((chosen, better), (rejected, worse)):
        ends = [i for i, token in enumerate(tokens) if token == tokenizer.eos_token_id]
        assert ends == [len(tokens) - 1]
        assert eos in tokenizer.decode(tokens[answer][:-1])


def test_on_request_they_are_control_tokens() -> None:
    tokenizer = TOKENIZERS["byte_level"]()
    messages = [turns("a", f"b{tokenizer.eos_token}c")]
    as_text = encode(messages, tokenizer, "alpaca", 512)
    tokenizer.special_tokens_as_text = False
    as_control = encode(messages, tokenizer, "alpaca", 512)
    count = [int((e.tokens == tokenizer.eos_token_id).sum()) for e in (as_text, as_control)]
    assert count == [1, 2]


def test_cached_tokens_know_the_choice() -> None:
    from fedllm_flwr.data.token_cache import _fingerprint

    tokenizer = TOKENIZERS["byte_level"]()
    before = _fingerprint(tokenizer)
    tokenizer.special_tokens_as_text = False
    assert _fingerprint(tokenizer) != before
