"""Laws that hold for any records: coverage of partitions, boundaries of examples, truncation."""

from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedllm_flwr.config.schema import PartitionConfig
from fedllm_flwr.data.encode import encode, encode_prompts
from fedllm_flwr.data.partition import partition
from fedllm_flwr.errors import ConfigError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
CLIENT_COUNTS = st.integers(1, 8)
SEEDS = st.integers(0, 2**31)


def merging_tokenizer() -> Any:
    """Byte-level BPE that looks ahead in white space, with merges of white space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "a"), ("ĊĊ", "ĊĊ")]
    tokens = ["</s>", *alphabet, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = (
        "{% for m in messages %}{{ m.role }}:\n\n{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n\n{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", chat_template=template
    )


TOKENIZER = merging_tokenizer()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from("abc"), min_size=8, max_size=60),
    st.sampled_from(["iid", "dirichlet", "natural", "pathological", "size"]),
    CLIENT_COUNTS,
    SEEDS,
)
def test_partition_covers_every_record_once(
    values: list[str], name: str, num_clients: int, seed: int
) -> None:
    config = PartitionConfig(name, column="kind", min_size=1, classes_per_client=1)
    try:
        divided = partition(values, config, None if name == "natural" else num_clients, seed)
    except ConfigError:
        assume(False)  # refused with a reason, which the unit tests check

    assigned = np.concatenate(divided.indices)
    assert len(set(assigned.tolist())) == len(assigned)
    assert min(len(rows) for rows in divided.indices) >= 1
    if name != "pathological":
        assert len(assigned) == len(values)


@settings(deadline=None, max_examples=150)
@given(TEXT, TEXT, st.sampled_from(["alpaca", "vicuna", "chat"]))
def test_tokens_before_an_answer_are_the_prompts_own(
    question: str, answer: str, template: str
) -> None:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    tokens, supervised = encode([messages], TOKENIZER, template, 10**6)[0]
    prompt = encode_prompts([messages[:1]], TOKENIZER, template)[0]
    np.testing.assert_array_equal(tokens[~supervised], prompt)
    assert not supervised[: len(prompt)].any()
    assert tokens[-1] == TOKENIZER.eos_token_id
    space = "" if template == "chat" else " "
    assert TOKENIZER.decode(tokens[supervised]) == f"{space}{answer}</s>"


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
    st.integers(1, 400),
    st.sampled_from(["right", "left", "drop"]),
)
def test_truncation_keeps_the_limit_and_an_answer(
    exchanges: list[tuple[str, str]], max_length: int, truncation: str
) -> None:
    messages = [
        {"role": role, "content": text}
        for exchange in exchanges
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]

    encoded = encode([messages], TOKENIZER, "vicuna", max_length, truncation)
    report = encoded.report
    assert report.num_examples + report.dropped == 1
    if len(encoded):
        tokens, supervised = encoded[0]
        assert len(tokens) <= max_length
        assert supervised.any()
        assert truncation != "drop" or tokens[-1] == TOKENIZER.eos_token_id
