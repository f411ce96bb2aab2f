"""The embedded preference pairs, as committed."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from transformers import AutoTokenizer

REPO = Path(__file__).parents[2]
ASSETS = REPO / "src/fedllm_flwr/assets"
BUILD = REPO / "scripts/build_demo"
KINDS = ["cut_off", "rude", "wrong"]
SPLITS = ("train", "test")

Row = dict[str, str]


def path_of(split: str) -> Path:
    return ASSETS / f"demo/preferences_{split}.jsonl"


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[Row]]:
    return {
        split: [
            json.loads(line) for line in path_of(split).read_text(encoding="utf-8").split("\n")[:-1]
        ]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def words() -> Any:
    """The vocabulary as it is written, read without the code that uses it."""
    return yaml.safe_load((BUILD / "preferences.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def companies() -> list[str]:
    vocabulary = yaml.safe_load((BUILD / "vocabulary.yaml").read_text(encoding="utf-8"))
    return [start + end for start in vocabulary["name_starts"] for end in vocabulary["name_ends"]]


def of_kind(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def patterns(phrases: list[str]) -> list[re.Pattern[str]]:
    """Each phrase as a whole text in which ``{t}`` is anything."""
    return [re.compile(re.escape(phrase).replace(r"\{t\}", ".+")) for phrase in phrases]


def sentences(manner: Any, split: str) -> list[str]:
    """The single sentences of all parts of a manner."""
    texts = [text for part in manner[split].values() for text in part]
    return [sentence for text in texts for sentence in re.split(r"(?<=[.?]) ", text)]


def test_every_record_has_two_different_replies(pairs: dict[str, list[Row]]) -> None:
    for row in pairs["train"] + pairs["test"]:
        assert list(row) == ["prompt", "chosen", "rejected", "desk", "kind"]
        assert all(value and value == value.strip() for value in row.values())
        assert row["chosen"] != row["rejected"]
        assert row["kind"] in KINDS


def test_no_reply_to_a_prompt_occurs_twice(pairs: dict[str, list[Row]]) -> None:
    rows = pairs["train"] + pairs["test"]
    replies = [(row["prompt"], row[reply]) for row in rows for reply in ("chosen", "rejected")]
    assert len(set(replies)) == len(replies)


def test_sizes(pairs: dict[str, list[Row]]) -> None:
    assert 800 <= len(pairs["train"]) <= 1500
    assert 240 <= len(pairs["test"]) <= 360
    assert sum(path_of(split).stat().st_size for split in SPLITS) < 600_000


def test_the_test_set_is_balanced_over_desks_and_kinds(pairs: dict[str, list[Row]]) -> None:
    counts = Counter((row["desk"], row["kind"]) for row in pairs["test"])
    assert len(counts) == 10 * len(KINDS)
    assert len(set(counts.values())) == 1


def test_desks_differ_in_size_and_in_the_kind_they_see(pairs: dict[str, list[Row]]) -> None:
    sizes = Counter(row["desk"] for row in pairs["train"])
    assert set(sizes) == {row["desk"] for row in pairs["test"]}
    assert max(sizes.values()) > 2 * min(sizes.values())
    counts = Counter((row["desk"], row["kind"]) for row in pairs["train"])
    main = {desk: max(KINDS, key=lambda kind: counts[desk, kind]) for desk in sizes}
    assert min(Counter(main.values())[kind] for kind in KINDS) >= 3
    for desk, size in sizes.items():
        assert counts[desk, main[desk]] > 0.9 * size, desk
        assert all(counts[desk, kind] > 0 for kind in KINDS), desk


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_length_does_not_tell_the_rejected_reply(
    split: str, kind: str, pairs: dict[str, list[Row]]
) -> None:
    rows = of_kind(pairs[split], kind)
    longer = sum(len(row["rejected"]) > len(row["chosen"]) for row in rows)
    assert 0.49 < longer / len(rows) < 0.51


@pytest.mark.parametrize("split", SPLITS)
def test_only_cut_off_replies_end_within_a_sentence(
    split: str, pairs: dict[str, list[Row]]
) -> None:
    for row in pairs[split]:
        assert row["chosen"].endswith((".", "?"))
        assert row["rejected"][-1].isalpha() == (row["kind"] == "cut_off")
    lengths = {len(row["rejected"].split()) for row in of_kind(pairs[split], "cut_off")}
    assert len(lengths) > 20
    assert min(lengths) <= 3
    assert max(lengths) >= 30


@pytest.mark.parametrize("split", SPLITS)
def test_replies_are_about_what_was_asked_unless_wrong(
    split: str, pairs: dict[str, list[Row]], words: Any
) -> None:
    subjects = re.compile(f"({'|'.join(words['items'][split])}) of [A-Z]\\w+ [A-Z]\\w+")
    for row in pairs[split]:
        (subject,) = {match[0] for match in subjects.finditer(row["prompt"])}
        assert subject in row["chosen"]
        if row["kind"] != "cut_off":
            assert (subject in row["rejected"]) == (row["kind"] == "rude")
        if row["kind"] == "wrong":
            assert not subjects.search(row["rejected"])


@pytest.mark.parametrize("split", SPLITS)
def test_only_rude_replies_have_rude_sentences(
    split: str, pairs: dict[str, list[Row]], words: Any
) -> None:
    rude = patterns(sentences(words["replies"]["rude"], split))
    polite = patterns(sentences(words["replies"]["polite"], split))
    for row in pairs[split]:
        for reply, known in (("chosen", polite), ("rejected", rude)):
            if reply == "rejected" and row["kind"] != "rude":
                continue
            for sentence in re.split(r"(?<=[.?]) ", row[reply]):
                assert any(pattern.fullmatch(sentence) for pattern in known), sentence
        if row["kind"] != "rude":
            for sentence in re.split(r"(?<=[.?]) ", row["rejected"]):
                assert not any(pattern.fullmatch(sentence) for pattern in rude), sentence


def test_the_sets_share_no_sentence_request_or_item(
    pairs: dict[str, list[Row]], words: Any
) -> None:
    for own, other in (("train", "test"), ("test", "train")):
        texts = [row["prompt"] for row in pairs[other]]
        replies = [row[key] for row in pairs[other] for key in ("chosen", "rejected")]
        said = {sentence for text in replies for sentence in re.split(r"(?<=[.?]) ", text)}
        for pattern in patterns(words["requests"][own]):
            assert not any(map(pattern.fullmatch, texts)), pattern
        for manner in words["replies"].values():
            for pattern in patterns(manner[own]["bodies"] + sentences(manner, own)):
                assert not any(map(pattern.fullmatch, said)), pattern
        for item in words["items"][own]:
            assert not any(item in text for text in texts + replies), item


def test_no_company_is_in_both_sets(pairs: dict[str, list[Row]], companies: list[str]) -> None:
    found = [
        {name for name in companies for row in pairs[split] if name in row["prompt"].split()}
        for split in SPLITS
    ]
    assert min(map(len, found)) > 50
    assert not found[0] & found[1]


def test_pairs_are_short_in_tokens(pairs: dict[str, list[Row]]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    rows = pairs["train"] + pairs["test"]
    texts = [f"{row['prompt']} {row[reply]}" for row in rows for reply in ("chosen", "rejected")]
    assert max(len(ids) for ids in tokenizer(texts)["input_ids"]) < 160
