"""Published and embedded preference sets: counts, and boundaries seen by decoding."""

import gzip
import json
import re
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from fedllm_flwr.config.compose import compose
from fedllm_flwr.data import sources
from fedllm_flwr.data.encode import encode_prompts
from fedllm_flwr.data.federated import FederatedData, load_federated_data
from fedllm_flwr.tasks.dpo.pairs import PREFERENCES, encode_pairs
from fedllm_flwr.tasks.preferences.records import Pair
from fedllm_flwr.tasks.sft.examples import INSTRUCTIONS
from toy_tokenizers import SHARED, TOKENIZERS

SETS = SHARED.parent / "dpo"
HH_RLHF, ULTRAFEEDBACK = SETS / "hh_rlhf_helpful_base.jsonl.gz", SETS / "ultrafeedback_train.jsonl"
needs_sets = pytest.mark.skipif(not SETS.exists(), reason="the real preference sets are not here")
HH_TEMPLATE = (
    r"{% for m in messages %}{{ '\n\nHuman: ' if m.role == 'user' else '\n\nAssistant: ' }}"
    r"{{ m.content }}{% endfor %}{{ '\n\nAssistant:' if add_generation_prompt }}"
)


def load_pairs(*overrides: str) -> FederatedData:
    return load_federated_data(compose(["task=dpo", *overrides]), PREFERENCES)


@cache
def load(data: str, path: Path) -> FederatedData:
    changes = ["data.eval_split=null", "data.validation_fraction=0", "partition=iid"]
    return load_pairs(f"data={data}", f"data.path={path}", *changes)


def decoded(tokenizer: Any, row: Any) -> tuple[str, str]:
    """Prompt and answer of a row as text, without what a tokenizer puts before every text."""
    tokens, supervised = row
    prompt, both = (
        tokenizer.decode(part).removeprefix(tokenizer.bos_token or "").removeprefix(" ")
        for part in (tokens[~supervised], tokens)
    )
    assert both.startswith(prompt)
    return prompt, both[len(prompt) :]


@needs_sets
def test_what_is_left_out_of_the_real_sets() -> None:
    dialogues, answers = load("hh_rlhf", HH_RLHF), load("ultrafeedback", ULTRAFEEDBACK)

    report = dialogues.report.train
    assert (report.read, report.usable, report.bad) == (2354, 2348, 0)
    assert (report.empty, report.equal) == (4, 2)
    report = answers.report.train
    assert (report.read, report.usable, report.bad) == (1000, 994, 0)
    assert (report.empty, report.equal) == (2, 4)
    numbers = [len(turns) for turns in dialogues.train["messages"]]
    assert sum(number > 1 for number in numbers) > 1000  # dialogues of several turns
    assert all(number % 2 == 1 for number in numbers)


def transcripts() -> list[tuple[str, str]]:
    """Raw usable dialogues in which no speaker has two turns in a row."""
    rows = [json.loads(line) for line in gzip.decompress(HH_RLHF.read_bytes()).splitlines()]
    kept = []
    for texts in ((row["chosen"], row["rejected"]) for row in rows):
        answers = [text[text.rindex("\n\nAssistant:") + 12 :].strip() for text in texts]
        speakers = ["".join(re.findall(r"\n\n(H|A)(?:uman|ssistant):", text)) for text in texts]
        repeated = any("AA" in some or "HH" in some for some in speakers)
        if all(answers) and answers[0] != answers[1] and not repeated:
            kept.append(texts)
    return kept


@needs_sets
@pytest.mark.parametrize("name", ["base7m", pytest.param("stories260k", marks=pytest.mark.slow)])
def test_dialogues_decode_to_their_transcripts(name: str) -> None:
    """The prompt is the transcript through its last "Assistant:", the answer is the rest."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = HH_TEMPLATE
    encoded = encode_pairs(list(load("hh_rlhf", HH_RLHF).train), tokenizer, "chat", 10**6)
    seen = {tuple(decoded(tokenizer, row) for row in encoded[i]) for i in range(len(encoded))}

    raw = transcripts()
    assert len(raw) > 2300
    for texts in raw:
        ends = [text.rindex("\n\nAssistant:") + len("\n\nAssistant:") for text in texts]
        expected = [
            (text[:end], f"{text[end:]}{tokenizer.eos_token}")
            for text, end in zip(texts, ends, strict=True)
        ]
        assert tuple(expected) in seen


@needs_sets
@pytest.mark.parametrize("name", ["base7m", "stories260k"])
@pytest.mark.parametrize("template", ["vicuna", "alpaca"])
def test_real_prompts_are_the_same_for_both_answers(name: str, template: str) -> None:
    tokenizer = TOKENIZERS[name]()
    pairs = [
        *islice(load("hh_rlhf", HH_RLHF).train, 300),
        *islice(load("ultrafeedback", ULTRAFEEDBACK).train, 100),
    ]
    encoded = encode_pairs(pairs, tokenizer, template, 10**6)
    alone = encode_prompts([pair.messages for pair in pairs], tokenizer, template)

    assert len(encoded) == len(pairs)
    for i, (pair, prompt) in enumerate(zip(pairs, alone, strict=True)):
        for (tokens, supervised), answer in zip(encoded[i], pair[1:3], strict=True):
            np.testing.assert_array_equal(tokens[~supervised], prompt)
            assert not supervised[: len(prompt)].any()
            text = tokenizer.decode(tokens[supervised])
            assert text.removeprefix(" ") == f"{answer}{tokenizer.eos_token}"


@needs_sets
def test_real_pairs_in_512_tokens_keep_what_they_should() -> None:
    tokenizer = TOKENIZERS["stories260k"]()
    pairs = list(islice(load("ultrafeedback", ULTRAFEEDBACK).train, 300))
    whole = encode_pairs(pairs, tokenizer, "vicuna", 10**6)
    encoded = encode_pairs(pairs, tokenizer, "vicuna", 512)

    assert encoded.lengths.max() == 512
    assert encoded.report.prompts_cut + encoded.report.answers_cut > 150
    for i, source in enumerate(encoded.source):
        (full, full_marks), _ = whole[source]
        (chosen, marks), (rejected, other) = encoded[i]
        kept, prompt = int((~marks).sum()), int((~full_marks).sum())
        np.testing.assert_array_equal(chosen[:kept], rejected[: int((~other).sum())])
        assert chosen[0] == tokenizer.bos_token_id
        np.testing.assert_array_equal(chosen[1:kept], full[prompt - kept + 1 : prompt])
        assert kept >= min(prompt, 256)


def test_hub_sets_come_as_lists_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns of HuggingFaceH4/ultrafeedback_binarized, without its texts."""
    asked = {"content": "q", "role": "user"}
    row = {
        "prompt": "q",
        "prompt_id": "0",
        "chosen": [asked, {"content": "good", "role": "assistant"}],
        "rejected": [asked, {"content": "bad", "role": "assistant"}],
        "messages": [asked, {"content": "good", "role": "assistant"}],
        "score_chosen": 8.0,
        "score_rejected": 4.0,
    }
    calls: list[tuple[Any, str]] = []

    def load_dataset(name: str, config: Any, split: str, revision: Any) -> datasets.Dataset:
        calls.append((name, split))
        return datasets.Dataset.from_list([row] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_pairs("data=ultrafeedback", "partition=iid")
    assert next(iter(data.train)) == Pair([asked], "good", "bad", "", "")
    assert len(data.eval) == 3
    assert calls == [
        ("HuggingFaceH4/ultrafeedback_binarized", split) for split in ("train_prefs", "test_prefs")
    ]


@pytest.mark.skipif(
    not (sources.DEMO / "preferences_train.jsonl").exists(), reason="the demo is not here yet"
)
def test_the_embedded_pairs_and_the_embedded_headlines_have_files_of_their_own() -> None:
    pairs = load_pairs("data=demo_preferences")
    headlines = load_federated_data(compose(["data=demo"]), INSTRUCTIONS)

    for part, name in ((pairs.train, "train"), (pairs.eval, "test")):
        file = sources.DEMO / f"preferences_{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        assert part["chosen"] == [row["chosen"] for row in rows]
        assert part["client"] == [row["desk"] for row in rows]
    assert pairs.report.held_out == pairs.report.train.empty == pairs.report.train.equal == 0
    assert "choice" in headlines.train.column_names
