"""MMLU likelihoods against a direct loop over transformers, on real questions."""

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm_flwr.commands.evaluate.arguments import evaluate_arguments
from fedllm_flwr.commands.main import _parsed

SHARED = Path(__file__).parents[3] / "shared/data"
MODEL = SHARED / "models/base7m"
SUBJECT = "miscellaneous"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.is_dir(), reason="no shared data here"),
]


@torch.no_grad()
def direct(prompt: str) -> list[float]:
    """log p of " A" to " D" after a prompt, one forward pass for each."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    start = tokenizer(prompt)["input_ids"]
    scores = []
    for letter in "ABCD":
        whole = tokenizer(f"{prompt} {letter}")["input_ids"]
        assert whole[: len(start)] == start
        log_probs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        places = range(len(start), len(whole))
        scores.append(sum(float(log_probs[t - 1, whole[t]]) for t in places))
    return scores


def test_fifty_questions_equal_a_direct_loop(tmp_path: Path) -> None:
    evaluate_arguments(
        _parsed(
            [
                *("evaluate", "--base", str(MODEL), "--task", "mmlu", "--prompt", "raw"),
                *("--shots", "0", "--limit", "50", "--data-root", str(SHARED / "eval")),
                *("--output", str(tmp_path), "--no-cache"),
            ]
        )
    )
    lines = (tmp_path / "predictions/base/mmlu.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    samples = [s for s in samples if s["part"] == f"mmlu_{SUBJECT}"]
    with (SHARED / f"eval/mmlu/test/{SUBJECT}_test.csv").open(newline="") as file:
        rows = list(csv.reader(file))[:50]
    assert len(samples) == 50
    for sample, (question, *options, letter) in zip(samples, rows, strict=True):
        listed = "\n".join(f"{k}. {text}" for k, text in zip("ABCD", options, strict=True))
        prompt = (
            f"The following are multiple choice questions (with answers) about {SUBJECT}.\n\n"
            f"{question.strip()}\n{listed}\nAnswer:"
        )
        expected = direct(prompt)
        assert sample["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
        assert sample["acc"] == float("ABCD"[expected.index(max(expected))] == letter)
