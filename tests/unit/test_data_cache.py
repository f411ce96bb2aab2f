"""The cache of encoded examples: equal to a fresh encoding, and never in the way."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.data.token_cache import Codec, encode_cached, load_encoded, save_encoded
from fedllm_flwr.tasks import find

OPTIONS = {"template": "vicuna", "max_length": 40, "truncation": "right"}


def byte_tokenizer(*special: str) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["</s>", *special, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


@dataclass
class Kind:
    """One kind of examples, and the number of records of every encoding that is really made."""

    task: str
    calls: list[int] = field(default_factory=list)

    @property
    def codec(self) -> Codec[Any]:
        codec = find(self.task).records.codec

        def counted(records: Any, *options: Any) -> Any:
            self.calls.append(len(records))
            return codec.encode(records, *options)

        return replace(codec, encode=counted)

    def cached(self, *args: Any, **options: Any) -> Any:
        return encode_cached(self.codec, *args, **options)

    def fresh(self, records: datasets.Dataset, tokenizer: Any) -> Any:
        return encode_cached(find(self.task).records.codec, records, tokenizer, **options())

    def records(self, *answers: str) -> datasets.Dataset:
        """A record per answer, of either kind; the worse answer is always the same."""
        asked = {"role": "user", "content": "q"}
        replies = [[{"role": "assistant", "content": answer}] for answer in answers]
        messages = [[asked, *(reply if self.task == "sft" else [])] for reply in replies]
        columns = {"messages": messages, "chosen": list(answers), "rejected": ["-"] * len(answers)}
        return datasets.Dataset.from_dict(columns | {"label": list(answers)})


@pytest.fixture(params=["sft", "dpo"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param)


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    assert one.report == other.report
    rows, others = (x if isinstance(x, Encoded) else x.rows for x in (one, other))
    for name in ("tokens", "supervised", "offsets", "source"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(others, name))
        assert getattr(rows, name).dtype == getattr(others, name).dtype
    assert rows.report == others.report


def options(**changes: Any) -> dict[str, Any]:
    return {**OPTIONS, "max_length": 400, **changes}


def test_hit_equals_fresh(tmp_path: Path, kind: Kind) -> None:
    train, tokenizer = kind.records("yes", "no", "你好"), byte_tokenizer()

    first = kind.cached(train, tokenizer, **options(cache_dir=tmp_path))
    second = kind.cached(train, tokenizer, **options(cache_dir=tmp_path))
    assert kind.calls == [3]
    assert_same(first, second)
    assert_same(second, kind.fresh(train, tokenizer))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_equal_records_hit_however_they_are_stored(tmp_path: Path, kind: Kind) -> None:
    tokenizer = byte_tokenizer()
    kind.cached(kind.records("a", "b"), tokenizer, **options(cache_dir=tmp_path))

    selected = kind.records("x", "a", "b", "y").select([1, 2])
    assert_same(
        kind.cached(selected, tokenizer, **options(cache_dir=tmp_path)),
        kind.fresh(selected, tokenizer),
    )
    joined = datasets.concatenate_datasets([kind.records("a"), kind.records("b")])
    kind.cached(joined, tokenizer, **options(cache_dir=tmp_path))
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=2)  # leaves its settings
    kind.cached(joined, tokenizer, **options(cache_dir=tmp_path))
    assert kind.calls == [2]


def test_everything_that_matters_is_in_the_key(tmp_path: Path, kind: Kind) -> None:
    chat_tokenizer = byte_tokenizer()
    chat_tokenizer.chat_template = "{{ messages[0].content }}"
    variants = [
        (kind.records("a"), byte_tokenizer(), {}),
        (kind.records("b"), byte_tokenizer(), {}),
        (kind.records("a", "a"), byte_tokenizer(), {}),
        (kind.records("a"), byte_tokenizer("<x>"), {}),
        (kind.records("a"), chat_tokenizer, {}),
        (kind.records("a"), byte_tokenizer(), {"template": "alpaca"}),
        (kind.records("a"), byte_tokenizer(), {"max_length": 399}),
        (kind.records("a"), byte_tokenizer(), {"truncation": "left"}),
    ]
    for train, tokenizer, changes in variants:
        kind.cached(train, tokenizer, **options(cache_dir=tmp_path, **changes))

    assert len(kind.calls) == len(variants) == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"cut"])
def test_broken_file_is_made_anew(
    content: bytes, tmp_path: Path, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    train, tokenizer = kind.records("yes", "no"), byte_tokenizer()
    first = kind.cached(train, tokenizer, **options(cache_dir=tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5] if content == b"cut" else content)

    assert_same(kind.cached(train, tokenizer, **options(cache_dir=tmp_path)), first)
    assert kind.calls == [2, 2]
    assert "made anew" in caplog.text
    assert_same(load_encoded(kind.codec, path), first)


def test_unwritable_directory_is_done_without(
    tmp_path: Path, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")

    encoded = kind.cached(
        kind.records("a"), byte_tokenizer(), **options(cache_dir=tmp_path / "file" / "cache")
    )
    assert len(encoded) == 1
    assert "not cached" in caplog.text


def test_no_directory_means_no_cache(kind: Kind) -> None:
    for _ in range(2):
        kind.cached(kind.records("a"), byte_tokenizer(), **options())

    assert kind.calls == [1, 1]


@pytest.mark.parametrize("answers", [(), ("x" * 500, "y")])
def test_save_and_load_empty_and_truncated(
    answers: tuple[str, ...], tmp_path: Path, kind: Kind
) -> None:
    encoded = kind.cached(kind.records(*answers), byte_tokenizer(), **options(max_length=300))
    save_encoded(kind.codec, encoded, tmp_path / "sub" / "e.safetensors")

    assert_same(load_encoded(kind.codec, tmp_path / "sub" / "e.safetensors"), encoded)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    kind = Kind("sft")
    encoded = kind.fresh(kind.records("a"), byte_tokenizer())
    path = tmp_path / "e.safetensors"
    save_encoded(kind.codec, replace(encoded, tokens=encoded.tokens[:-1]), path)

    with pytest.raises(ValueError, match="tokens is int32"):
        load_encoded(kind.codec, path)


def test_both_answers_of_a_pair_and_the_kind_are_in_the_key(tmp_path: Path) -> None:
    pairs, tokenizer = Kind("dpo"), byte_tokenizer()
    records = pairs.records("a")
    worse = records.remove_columns("rejected").add_column("rejected", ["--"])
    for train in (records, worse):
        pairs.cached(train, tokenizer, **options(cache_dir=tmp_path))
    Kind("sft").cached(Kind("sft").records("a"), tokenizer, **options(cache_dir=tmp_path))

    assert pairs.calls == [1, 1]
    assert len(list(tmp_path.iterdir())) == 3
