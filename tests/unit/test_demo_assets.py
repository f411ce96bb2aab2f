"""The embedded data set and model, as committed."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm_flwr.data.choices import encode_choices
from fedllm_flwr.data.templates import ALPACA, render

REPO = Path(__file__).parents[2]
ASSETS = REPO / "src/fedllm_flwr/assets"
BUILD = REPO / "scripts/build_demo"
LABELS = ["negative", "neutral", "positive"]
MEGABYTE = 10**6

Row = dict[str, str]


def rows(split: str) -> list[Row]:
    text = (ASSETS / f"demo/{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def train() -> list[Row]:
    return rows("train")


@pytest.fixture(scope="module", name="test")
def held_out() -> list[Row]:
    return rows("test")


@pytest.fixture(scope="module")
def words() -> Any:
    """The vocabulary as it is written, read without the code that uses it."""
    return yaml.safe_load((BUILD / "vocabulary.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ASSETS / "tiny")


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", dtype=torch.float32).eval()


def test_the_script_writes_the_committed_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.build_demo", str(tmp_path), "--data-only"]
    subprocess.run(command, check=True, cwd=REPO)
    names = ["preferences_test.jsonl", "preferences_train.jsonl", "test.jsonl", "train.jsonl"]
    assert sorted(path.name for path in tmp_path.rglob("*.jsonl")) == names
    for name in names:
        assert (tmp_path / "demo" / name).read_bytes() == (ASSETS / "demo" / name).read_bytes()


def test_every_record_has_text_a_label_and_a_desk(train: list[Row], test: list[Row]) -> None:
    for row in train + test:
        assert list(row) == ["instruction", "input", "output", "desk"]
        assert all(value.strip() for value in row.values())
        assert row["output"] in LABELS
    headlines = [row["input"] for row in train + test]
    assert len(set(headlines)) == len(headlines)


def test_the_test_set_is_balanced_over_desks_and_labels(test: list[Row]) -> None:
    counts = Counter((row["desk"], row["output"]) for row in test)
    assert len(counts) == 10 * len(LABELS)
    assert set(counts.values()) == {12}


def test_desks_differ_in_size_and_mood(train: list[Row], test: list[Row]) -> None:
    sizes = Counter(row["desk"] for row in train)
    assert set(sizes) == {row["desk"] for row in test}
    assert max(sizes.values()) > 2 * min(sizes.values())
    counts = Counter((row["desk"], row["output"]) for row in train)
    moods = {max(LABELS, key=lambda label: counts[desk, label]) for desk in sizes}
    assert moods == set(LABELS)
    for desk, size in sizes.items():
        shares = sorted(counts[desk, label] / size for label in LABELS)
        assert shares[-1] > 0.6, desk
        assert 0 < shares[0] < 0.1, desk


def company_names(words: Any) -> list[str]:
    return [start + end for start in words["name_starts"] for end in words["name_ends"]]


def test_no_company_is_in_both_sets(words: Any, train: list[Row], test: list[Row]) -> None:
    names = company_names(words)
    found = [{named(row["input"], names) for row in split} for split in (train, test)]
    assert min(map(len, found)) > 50
    assert not found[0] & found[1]


def named(headline: str, names: list[str]) -> str:
    (name,) = [name for name in names if name in headline.split() or f"{name} " in headline]
    return name


def phrases(words: Any, split: str) -> Iterator[str]:
    """Every verb phrase, adjective, noun and event of a split."""
    for movement in words["movements"].values():
        for kind in movement[split].values():
            yield from kind
    for source in [words["common_events"], *words["desks"].values()]:
        for events in source[split].values():
            yield from events


def forms(phrase: str) -> list[str]:
    """A verb phrase in the plural and in the singular; harmless for other phrases."""
    first, space, rest = phrase.partition(" ")
    return [phrase, *(f"{first}{ending}{space}{rest}" for ending in ("s", "es"))]


def test_the_sets_share_no_phrasing(words: Any, train: list[Row], test: list[Row]) -> None:
    for own, other_rows in (("test", train), ("train", test)):
        others = " | ".join(row["input"].lower().replace(",", "") for row in other_rows) + " |"
        for phrase in phrases(words, own):
            for form in forms(phrase.lower()):
                assert f" {form} " not in others


def test_the_sets_share_no_leading_word(words: Any) -> None:
    """Of verbs, events, adjectives and nouns, in their base form."""
    articles = {"a", "an", "no", "is"}
    train, test = (
        {
            next(word for word in phrase.split() if word not in articles).removesuffix("s")
            for phrase in phrases(words, split)
        }
        for split in ("train", "test")
    )
    assert len(train) > 50
    assert len(test) > 50
    assert train & test == set()


def test_sizes_on_disk() -> None:
    sizes = {
        name: sum(path.stat().st_size for path in (ASSETS / name).iterdir())
        for name in ("demo", "tiny")
    }
    assert sizes["demo"] < MEGABYTE
    assert sizes["tiny"] < 6 * MEGABYTE


def test_the_weights_are_bfloat16_and_tied(model: Any) -> None:
    with safe_open(ASSETS / "tiny/model.safetensors", framework="pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert dtypes == {"BF16"}
    assert model.config.model_type == "llama"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert 1_500_000 < sum(weights.numel() for weights in model.parameters()) < 2_500_000


def test_special_tokens(tokenizer: Any, model: Any) -> None:
    ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(ids) == 3
    assert tokenizer("Hello")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("a</s>")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings


@given(text=st.text())
def test_the_tokenizer_is_lossless(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_the_demo_is_short_in_tokens(tokenizer: Any, train: list[Row], test: list[Row]) -> None:
    preamble = ALPACA.preamble
    assert len(tokenizer(preamble, add_special_tokens=False)["input_ids"]) == 1
    for label in LABELS:
        assert len(tokenizer(f" {label}", add_special_tokens=False)["input_ids"]) == 1
    texts = [f"{row['instruction']} {row['input']}" for row in train + test]
    assert max(len(ids) for ids in tokenizer(texts)["input_ids"]) < 64


def test_chat_and_alpaca_are_one_layout(tokenizer: Any) -> None:
    chat = [
        {"role": "user", "content": "Name it."},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Please."},
        {"role": "assistant", "content": "Gladly."},
    ]
    for messages in (chat, chat[:2], [{"role": "system", "content": "Be brief."}, *chat]):
        text = "".join(segment.text for segment in render(messages, "alpaca", tokenizer))
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered == tokenizer.bos_token + text


def accuracy(model: Any, tokenizer: Any, test: list[Row]) -> float:
    """Share of test rows whose label is the likeliest of the three single-token answers."""
    conversations = [
        [
            {"role": "user", "content": f"{row['instruction']} {row['input']}"},
            {"role": "assistant", "content": row["output"]},
        ]
        for row in test
    ]
    choices = encode_choices(conversations, LABELS, tokenizer, "alpaca", 256)
    label_ids = [int(answer[0]) for answer in choices.answers[0]]
    correct = 0
    for prompt, row in zip(choices.prompts, test, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor(prompt)[None].long()).logits[0, -1, label_ids]
        correct += LABELS[int(logits.argmax())] == row["output"]
    return correct / len(test)


def test_the_base_model_does_not_know_the_task(model: Any, tokenizer: Any, test: list[Row]) -> None:
    assert 0.15 < accuracy(model, tokenizer, test) < 0.5


QUESTIONS = {
    "Which way did the figure go? Eskstow Bank reports higher deposits": "Up.",
    "Which way did the figure go? Eskstow Bank posts a slump in deposits": "Down.",
    "Which desk should write about this? Eskstow Dairy changes a recipe": "food",
    "Which desk should write about this? Eskstow Rail grounds its fleet": "transport",
}


@pytest.mark.parametrize(("request_text", "answer"), QUESTIONS.items())
def test_the_base_model_answers_what_it_was_taught(
    request_text: str, answer: str, model: Any, tokenizer: Any
) -> None:
    template = ALPACA
    prompt = template.preamble + template.prompt(request_text, first=True)
    ids = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(output[0, ids["input_ids"].shape[1] :]) == f" {answer}</s>"
