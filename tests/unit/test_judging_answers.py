"""Writing answers: sampling with seeds, turns, limits, and going on after a stop."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm_flwr.config import Config
from fedllm_flwr.data.encode import encode_prompts
from fedllm_flwr.evaluation.judging.questions import OpenQuestion
from fedllm_flwr.evaluation.judging.written_answers import (
    AnsweredQuestion,
    GenerationRequest,
    Writer,
    WrittenAnswer,
    answer_all,
)
from fedllm_flwr.evaluation.suites.suite_model import TextModel
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.models.generation import SeededSampling

MakeConfig = Callable[..., Config]


@pytest.fixture
def model(make_config: MakeConfig) -> AdaptedModel:
    model = load_model(make_config())
    rng = np.random.default_rng(1)
    model.load({n: rng.normal(0, 0.2, v.shape) for n, v in model.initial.items()})
    return model


def writer(model: AdaptedModel, max_new_tokens: int = 8, context: int = 400) -> Writer:
    asked = TextModel(model, template="vicuna")
    asked.__dict__["max_length"] = context  # in the place of the cached property
    return Writer(asked, max_new_tokens)


def questions(count: int, temperature: float = 0.9) -> list[OpenQuestion]:
    """Of two turns, all but the first, and of several lengths."""
    return [
        OpenQuestion(
            str(i), "any", ("Say it" + " again" * (3 * i % 7), "Why?")[: 1 + (i > 0)], temperature
        )
        for i in range(count)
    ]


def request(text: str, seed: int, temperature: float) -> GenerationRequest:
    return GenerationRequest([{"role": "user", "content": text}], temperature, seed)


def test_sampling_follows_the_softmax() -> None:
    """4,000 draws at two temperatures against the probabilities themselves."""
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    rows, temperatures = 4_000, (0.5, 2.0)
    for temperature in temperatures:
        sampling = SeededSampling([temperature] * rows, range(rows))
        drawn = sampling(torch.zeros(rows, 1), scores.repeat(rows, 1)).argmax(-1)
        shares = np.bincount(drawn.numpy(), minlength=5) / rows
        expected = np.exp(scores.numpy() / temperature)
        expected /= expected.sum()
        assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 / rows)


def test_temperature_zero_keeps_the_scores() -> None:
    scores = torch.randn(3, 7)
    mixed = SeededSampling([0.0, 0.7, 0.0], [1, 2, 3])(torch.zeros(3, 1), scores)
    assert torch.equal(mixed[[0, 2]], scores[[0, 2]])
    assert torch.isfinite(mixed[1]).sum() == 1


def test_an_answer_does_not_depend_on_its_neighbours(model: AdaptedModel) -> None:
    asked = [
        request(text, seed, temperature)
        for text, seed, temperature in [("Hi", 1, 0.9), ("Hello there", 2, 0.0), ("Hi", 3, 0.9)]
    ]
    together = writer(model).write(asked)
    assert together == [writer(model).write([one])[0] for one in asked]
    assert together[0] != together[2]  # other seeds, other answers
    assert writer(model).write(asked) == together


def test_prompts_that_are_too_long_lose_their_start(model: AdaptedModel) -> None:
    long, short = request("word " * 100, 0, 0.0), request("Hi", 0, 0.0)
    [cut, whole] = writer(model, 8, context=300).write([long, short])
    [tokens] = encode_prompts([long.messages], model.tokenizer, "vicuna")
    assert cut.prompt_cut == len(tokens) - (300 - 8)
    assert whole.prompt_cut == 0


@dataclass
class Counting:
    """The real writer, and what it was asked; stops before the call of number `stop_at`."""

    real: Writer
    stop_at: int | None = None
    asked: list[list[GenerationRequest]] = field(default_factory=list)

    def write(self, requests: Sequence[GenerationRequest]) -> list[WrittenAnswer]:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(list(requests))
        return self.real.write(requests)


def run(
    path: Path, counted: Counting, count: int = 5, identity: str = "model"
) -> list[AnsweredQuestion]:
    writer: Any = counted
    return answer_all(questions(count), writer, path, identity, seed=3, batch_size=2)


def test_second_turns_see_the_first_answers(model: AdaptedModel, tmp_path: Path) -> None:
    counted = Counting(writer(model))
    answered = run(tmp_path / "a.jsonl", counted)
    assert [item.question.id for item in answered] == ["0", "1", "2", "3", "4"]
    assert [len(item.answers) for item in answered] == [1, 2, 2, 2, 2]
    first = {r.messages[0]["content"]: r for batch in counted.asked for r in batch}
    for item in answered[1:]:
        last = first[item.question.turns[0]]
        assert last.messages == [
            {"role": "user", "content": item.question.turns[0]},
            {"role": "assistant", "content": item.texts[0]},
            {"role": "user", "content": "Why?"},
        ]


@pytest.mark.parametrize("stop_at", [2])
def test_a_stopped_run_goes_on_exactly(stop_at: int, model: AdaptedModel, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.jsonl", Counting(writer(model)))
    path = tmp_path / "stopped.jsonl"
    stopped, resumed = Counting(writer(model), stop_at), Counting(writer(model))
    with pytest.raises(KeyboardInterrupt):
        run(path, stopped)
    kept = len(path.read_text().splitlines())
    assert run(path, resumed) == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    first_turns = sum(len(r.messages) == 1 for batch in resumed.asked for r in batch)
    assert first_turns == 5 - kept
    again = Counting(writer(model))
    assert run(path, again) == whole
    assert again.asked == []


def test_answers_of_another_model_are_not_used(model: AdaptedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    run(path, Counting(writer(model)))
    other = Counting(writer(model))
    run(path, other, identity="another")
    assert sum(len(batch) for batch in other.asked) == 9
    assert {len(json.loads(line)["answers"]) for line in path.read_text().splitlines()} == {1, 2}


@pytest.mark.slow
def test_a_torn_batch_is_written_anew_to_the_same_bits(model: AdaptedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    whole = run(path, Counting(writer(model)))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # within the second batch of two
    assert run(path, Counting(writer(model))) == whole
    assert path.read_bytes() == b"".join(lines)
