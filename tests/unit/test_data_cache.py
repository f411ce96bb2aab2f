"""The cache of encoded examples: equal to a fresh encoding, and never in the way."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedllm_flwr.data import cache
from fedllm_flwr.data.cache import encode_cached, load_encoded, save_encoded
from fedllm_flwr.data.encode import Encoded, encode

OPTIONS = {"template": "vicuna", "max_length": 40, "truncation": "right"}


def byte_tokenizer(*special: str) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["</s>", *special, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


def records(*answers: str) -> datasets.Dataset:
    conversations = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        for answer in answers
    ]
    return datasets.Dataset.from_dict({"messages": conversations, "label": list(answers)})


def assert_same(one: Encoded, other: Encoded) -> None:
    for name in ("tokens", "supervised", "offsets", "source"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert one.report == other.report


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of records of every encoding that is really made."""
    made: list[int] = []

    def counted(conversations: Any, *args: Any, **options: Any) -> Encoded:
        made.append(len(conversations))
        return encode(conversations, *args, **options)

    monkeypatch.setattr(cache, "encode", counted)
    return made


def options(**changes: Any) -> dict[str, Any]:
    return {**OPTIONS, "max_length": 400, **changes}


def test_hit_equals_fresh(tmp_path: Path, calls: list[int]) -> None:
    train, tokenizer = records("yes", "no", "你好"), byte_tokenizer()

    first = encode_cached(train, tokenizer, **options(cache_dir=tmp_path))
    second = encode_cached(train, tokenizer, **options(cache_dir=tmp_path))
    assert calls == [3]
    assert_same(first, second)
    assert_same(second, encode(train["messages"][:], tokenizer, **options()))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_equal_records_hit_however_they_are_stored(tmp_path: Path, calls: list[int]) -> None:
    tokenizer = byte_tokenizer()
    encode_cached(records("a", "b"), tokenizer, **options(cache_dir=tmp_path))

    selected = records("x", "a", "b", "y").select([1, 2])
    assert_same(
        encode_cached(selected, tokenizer, **options(cache_dir=tmp_path)),
        encode(selected["messages"][:], tokenizer, **options()),
    )
    joined = datasets.concatenate_datasets([records("a"), records("b")])
    encode_cached(joined, tokenizer, **options(cache_dir=tmp_path))
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=2)  # leaves its settings
    encode_cached(joined, tokenizer, **options(cache_dir=tmp_path))
    assert calls == [2]


def test_everything_that_matters_is_in_the_key(tmp_path: Path, calls: list[int]) -> None:
    chat_tokenizer = byte_tokenizer()
    chat_tokenizer.chat_template = "{{ messages[0].content }}"
    variants = [
        (records("a"), byte_tokenizer(), {}),
        (records("b"), byte_tokenizer(), {}),
        (records("a", "a"), byte_tokenizer(), {}),
        (records("a"), byte_tokenizer("<x>"), {}),
        (records("a"), chat_tokenizer, {}),
        (records("a"), byte_tokenizer(), {"template": "alpaca"}),
        (records("a"), byte_tokenizer(), {"max_length": 399}),
        (records("a"), byte_tokenizer(), {"truncation": "left"}),
    ]
    for train, tokenizer, changes in variants:
        encode_cached(train, tokenizer, **options(cache_dir=tmp_path, **changes))

    assert len(calls) == len(variants) == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"cut"])
def test_broken_file_is_made_anew(
    content: bytes, tmp_path: Path, calls: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    train, tokenizer = records("yes", "no"), byte_tokenizer()
    first = encode_cached(train, tokenizer, **options(cache_dir=tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5] if content == b"cut" else content)

    assert_same(encode_cached(train, tokenizer, **options(cache_dir=tmp_path)), first)
    assert calls == [2, 2]
    assert "made anew" in caplog.text
    assert_same(load_encoded(path), first)


def test_unwritable_directory_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")

    encoded = encode_cached(
        records("a"), byte_tokenizer(), **options(cache_dir=tmp_path / "file" / "cache")
    )
    assert len(encoded) == 1
    assert "not cached" in caplog.text


def test_no_directory_means_no_cache(calls: list[int]) -> None:
    for _ in range(2):
        encode_cached(records("a"), byte_tokenizer(), **options())

    assert calls == [1, 1]


def test_save_and_load_empty_and_truncated(tmp_path: Path) -> None:
    for conversations in ([], records("x" * 500)["messages"][:]):
        encoded = encode(conversations, byte_tokenizer(), "vicuna", 300, "right")
        save_encoded(encoded, tmp_path / "sub" / "e.safetensors")
        assert_same(load_encoded(tmp_path / "sub" / "e.safetensors"), encoded)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    encoded = encode(records("a")["messages"][:], byte_tokenizer(), "vicuna", 300)
    path = tmp_path / "e.safetensors"
    save_encoded(Encoded(encoded.tokens[:-1], *list(vars(encoded).values())[1:]), path)

    with pytest.raises(ValueError, match="tokens is int32"):
        load_encoded(path)
