"""The cache of encoded examples: equal to a fresh encoding, and never in the way."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedllm_flwr.data import token_cache
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.data.token_cache import Codec, encode_cached, load_encoded, save_chunks
from fedllm_flwr.tasks import find
from fedllm_flwr.tasks.preferences.records import Pair
from fedllm_flwr.tasks.sft.records import Example

OPTIONS = {"template": "vicuna", "max_length": 400, "truncation": "right"}


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

    def cached(self, records: Sequence[Any], tokenizer: Any, **options: Any) -> Any:
        """As a run encodes `records`, whose content is their identity here."""
        return encode_cached(self.codec, repr(records), lambda: records, tokenizer, **options)

    def fresh(self, records: Sequence[Any], tokenizer: Any) -> Any:
        rows = [tuple(getattr(record, name) for name in self.codec.columns) for record in records]
        codec = find(self.task).records.codec
        return codec.encode(rows, tokenizer, *OPTIONS.values())

    def records(self, *answers: str) -> list[Any]:
        """A record per answer, of either kind; the worse answer is always the same."""
        asked = {"role": "user", "content": "q"}
        if self.task == "dpo":
            return [Pair([asked], answer, "-", "", "") for answer in answers]
        replies = [{"role": "assistant", "content": answer} for answer in answers]
        return [Example([asked, reply], "", "", -1) for reply in replies]


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
    return {**OPTIONS, **changes}


def test_hit_equals_fresh(tmp_path: Path, kind: Kind) -> None:
    train, tokenizer = kind.records("yes", "no", "你好"), byte_tokenizer()

    first = kind.cached(train, tokenizer, **options(folder=tmp_path))
    second = kind.cached(train, tokenizer, **options(folder=tmp_path))
    assert kind.calls == [3]
    assert_same(first, second)
    assert_same(second, kind.fresh(train, tokenizer))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_chunks_are_joined_as_if_encoded_together(
    count: int, tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_RECORDS", 3)
    tokenizer = byte_tokenizer()
    records = kind.records(*(f"answer {i} " + "x" * 90 * i for i in range(count)))

    whole = kind.fresh(records, tokenizer)
    assert_same(kind.cached(records, tokenizer, **options(folder=tmp_path)), whole)
    assert max(kind.calls) <= 3
    assert sum(kind.calls) == count
    assert_same(kind.cached(records, tokenizer, **options()), whole)  # without a folder


def test_a_hit_opens_no_records(tmp_path: Path, kind: Kind) -> None:
    tokenizer = byte_tokenizer()
    records = kind.records("a", "b")
    first = kind.cached(records, tokenizer, **options(folder=tmp_path))
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=2)  # leaves its settings

    def unread() -> Any:
        raise AssertionError("read")

    args = (kind.codec, repr(records), unread, tokenizer)
    assert_same(encode_cached(*args, **options(folder=tmp_path)), first)
    assert kind.calls == [2]


def test_tokens_are_mapped_and_counted(tmp_path: Path, kind: Kind) -> None:
    for _ in range(2):
        encoded = kind.cached(
            kind.records("yes", "no"), byte_tokenizer(), **options(folder=tmp_path)
        )
        rows = encoded if isinstance(encoded, Encoded) else encoded.rows
        assert isinstance(rows.tokens.base, np.memmap)
        assert not rows.tokens.flags.writeable
        np.testing.assert_array_equal(encoded.token_counts, np.bincount(rows.tokens))


def test_processes_that_encode_the_same_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/unit'); sys.path.insert(0, 'tests'); "
        "from pathlib import Path; from test_data_cache import *; kind = Kind('sft'); "
        "records = kind.records(*(f'{i} ' * 50 for i in range(5000))); "
        "folder = Path(sys.argv[1]); "
        "print(int(kind.cached(records, byte_tokenizer(), **options(folder=folder)).tokens.sum()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    root = Path(__file__).parents[2]
    both = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    sums = {process.communicate()[0].split()[-1] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(sums) == 1
    (path,) = tmp_path.iterdir()
    assert int(load_encoded(Kind("sft").codec, path).tokens.sum()) == int(sums.pop())


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
        kind.cached(train, tokenizer, **options(folder=tmp_path, **changes))

    assert len(kind.calls) == len(variants) == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"cut"])
def test_broken_file_is_made_anew(
    content: bytes, tmp_path: Path, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    train, tokenizer = kind.records("yes", "no"), byte_tokenizer()
    first = kind.cached(train, tokenizer, **options(folder=tmp_path))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.unlink()  # it is mapped
    path.write_bytes(whole[:-5] if content == b"cut" else content)

    assert_same(kind.cached(train, tokenizer, **options(folder=tmp_path)), first)
    assert kind.calls == [2, 2]
    assert "encoded again" in caplog.text
    assert_same(load_encoded(kind.codec, path), first)


def test_unwritable_directory_is_done_without(
    tmp_path: Path, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")

    encoded = kind.cached(
        kind.records("a"), byte_tokenizer(), **options(folder=tmp_path / "file" / "cache")
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
    save_chunks([kind.codec.pack(encoded)], tmp_path / "sub" / "e.safetensors")

    assert_same(load_encoded(kind.codec, tmp_path / "sub" / "e.safetensors"), encoded)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    kind = Kind("sft")
    encoded = kind.fresh(kind.records("a"), byte_tokenizer())
    path = tmp_path / "e.safetensors"
    save_chunks([(replace(encoded, offsets=encoded.offsets[:-1]), {})], path)

    with pytest.raises(ValueError, match=r"holds .* examples and tokens"):
        load_encoded(kind.codec, path)


def test_both_answers_of_a_pair_and_the_kind_are_in_the_key(tmp_path: Path) -> None:
    pairs, tokenizer = Kind("dpo"), byte_tokenizer()
    records = pairs.records("a")
    worse = [pair._replace(rejected="--") for pair in records]
    for train in (records, worse):
        pairs.cached(train, tokenizer, **options(folder=tmp_path))
    Kind("sft").cached(Kind("sft").records("a"), tokenizer, **options(folder=tmp_path))

    assert pairs.calls == [1, 1]
    assert len(list(tmp_path.iterdir())) == 3
