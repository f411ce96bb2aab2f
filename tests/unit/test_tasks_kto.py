"""KTO: records, tokens, loss by hand, scores, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedllm_flwr.client.local_evaluation import evaluate_locally
from fedllm_flwr.client.local_round import train_locally
from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.compose import compose
from fedllm_flwr.config.schema import ColumnsConfig, DataConfig, KtoConfig
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.data.federated import load_federated_data
from fedllm_flwr.deployment.policy import Policy
from fedllm_flwr.errors import ConfigError, DataError, RefusedError
from fedllm_flwr.federation.messages import Acknowledged, Assignment
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.params import Params, add
from fedllm_flwr.tasks import find
from fedllm_flwr.tasks.kto.examples import JUDGED, EncodedAnswers, encode_answers
from fedllm_flwr.tasks.kto.held_out import answer_scores
from fedllm_flwr.tasks.kto.losses import kto_loss, reference_point
from fedllm_flwr.tasks.kto.records import Judged
from toy_answers import random_answers
from toys import byte_tokenizer

MakeConfig = Callable[..., Config]
TOKENIZER = byte_tokenizer()
ASKED = [{"role": "user", "content": "Why?"}]


# --- records


def load(tmp_path: Path, rows: list[dict[str, Any]], **data: Any) -> list[Judged]:
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = Config(data=DataConfig(path=str(path), validation_fraction=0.0, **data))
    records = load_federated_data(config, JUDGED).train
    fields = zip(*(records[name][:] for name in Judged._fields), strict=True)
    return [Judged(*values) for values in fields]


def row(answer: str = "So.", label: Any = True, prompt: str = "Why?") -> dict[str, Any]:
    return {"prompt": prompt, "answer": answer, "label": label}


@pytest.mark.parametrize("verdicts", [(True, False), (1, 0), ("true", "False"), ("1", " 0 ")])
def test_judged_answers(verdicts: tuple[Any, Any], tmp_path: Path) -> None:
    good, bad = load(tmp_path, [row("So.", verdicts[0]), row("Go away.", verdicts[1])])
    assert good == (ASKED, "So.", "", "desirable", "")
    assert bad == (ASKED, "", "Go away.", "undesirable", "")


def test_other_column_names_and_turns(tmp_path: Path) -> None:
    turns = [*ASKED, {"role": "assistant", "content": "So."}]
    columns = ColumnsConfig(answer="completion", desirable="liked")
    assert load(tmp_path, [{"completion": turns, "liked": True}], columns=columns) == [
        (ASKED, "So.", "", "desirable", "")
    ]


def test_preference_pairs_are_read_unpaired(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "chosen": "So.", "rejected": "Go away."}]
    assert load(tmp_path, rows) == [(ASKED, "So.", "Go away.", "", "")]


def test_published_dialogues_are_read_unpaired(tmp_path: Path) -> None:
    asked = "\n\nHuman: Why?\n\nAssistant:"
    rows = [{"chosen": f"{asked} So.", "rejected": f"{asked} Go away."}]
    assert load(tmp_path, rows, preprocessing="hh_rlhf") == [(ASKED, "So.", "Go away.", "", "")]


WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no label": (
        [{"prompt": "Why?", "answer": "So."}],
        r"data\.columns\.desirable=label, but there is no such column",
    ),
    "no answer": (
        [{"prompt": "Why?", "completion": "So.", "label": True}],
        r"data\.columns\.answer=answer, but there is no such column",
    ),
    "no prompt": (
        [{"question": "Why?", "answer": "So.", "label": True}],
        r"data\.columns\.prompt=prompt, but there is no such column",
    ),
    "instructions": (
        [{"instruction": "Why?", "output": "So."}],
        "holds instructions, not judged answers; use task=sft",
    ),
    "another verdict": ([row(), row(label="good")], "record 2: column 'label' is neither true nor"),
    "two": ([row(), row(label=2)], "record 2: column 'label' is neither true nor false"),
    "a gap": ([row(), row(label=None)], "record 2: column 'label' is missing"),
    "an empty answer": ([row(), row(" ")], "record 2: the answer in column 'answer' is empty"),
}


@pytest.mark.parametrize(("rows", "message"), WRONG.values(), ids=WRONG)
def test_unusable_records(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, rows)


# --- tokens


def judged(good: str = "", bad: str = "", asked: str = "Why?") -> Judged:
    return Judged([{"role": "user", "content": asked}], good, bad, "", "")


def text(row: tuple[np.ndarray, np.ndarray]) -> tuple[str, str]:
    tokens, supervised = row
    return TOKENIZER.decode(tokens[~supervised]), TOKENIZER.decode(tokens[supervised])


def test_each_answer_is_a_row() -> None:
    records = [judged("So."), judged("Yes.", "No.", "Really?"), judged(bad="Go away.")]
    encoded = encode_answers(records, TOKENIZER, "vicuna", 400)
    assert encoded.desirable.tolist() == [True, True, False, False]
    assert encoded.source.tolist() == [0, 1, 1, 2]
    answers = [text(encoded.rows[i])[1] for i in range(4)]
    assert answers == [" So.</s>", " Yes.</s>", " No.</s>", " Go away.</s>"]
    assert "Really?" in text(encoded.rows[2])[0]
    assert encoded.report.summary == ""


def test_the_cache_knows_which_answers_are_desirable() -> None:
    records = [judged(bad="a"), judged("b"), judged("c", "d"), judged(bad="x" * 90), judged("e")]
    encoded = encode_answers(records, TOKENIZER, "vicuna", 230, "drop")
    assert encoded.report.dropped == 1
    back = JUDGED.codec.unpack(*JUDGED.codec.pack(encoded))
    assert back.report == encoded.report
    assert back.rows.report == encoded.rows.report
    np.testing.assert_array_equal(back.desirable, [False, True, True, False, True])
    for name in ("tokens", "supervised", "offsets", "source"):
        np.testing.assert_array_equal(getattr(back.rows, name), getattr(encoded.rows, name))


@pytest.mark.parametrize(
    ("truncation", "kept"), [("right", 2), ("left", 2), ("drop", 1), ("keep", 2)]
)
def test_what_is_too_long(truncation: str, kept: int) -> None:
    records = [judged("yes"), judged("a" * 300, asked="b" * 300)]
    encoded = encode_answers(records, TOKENIZER, "vicuna", 200, truncation)
    assert len(encoded) == kept
    assert encoded.lengths.max() <= 200
    if kept == 2:
        assert encoded.report.summary == (
            "of 2 answers 1 lost the start of their prompt, 1 were cut, 0 left out"
        )
        assert int(encoded.rows[1][1].sum()) == 100  # the prompt keeps half


def test_mismatched_answers_are_those_before() -> None:
    records = [judged("one", asked="1"), judged(bad="two", asked="2"), judged("three", asked="3")]
    encoded = encode_answers(records, TOKENIZER, "vicuna", 400)
    mixed = encoded.mismatched(np.array([2, 0, 1]), 400)
    found = [text(mixed[i]) for i in range(3)]
    assert [answer for _, answer in found] == [" two</s>", " three</s>", " one</s>"]
    assert [asked.split("USER: ")[1][0] for asked, _ in found] == ["3", "1", "2"]
    assert encoded.mismatched(np.array([0, 1]), 40).lengths.tolist() == [40, 40]


# --- loss and scores


def test_loss_by_hand() -> None:
    """beta 0.5, z0 1: a gain of 2 is sigma(1) = 0.731059, one of -3 sigma(-1.5) = 0.182426."""
    ratio = torch.tensor([3.0, 4.0, -1.0])
    desirable = torch.tensor([True, False, False])
    loss = kto_loss(
        ratio, desirable, 1.0, KtoConfig(beta=0.5, desirable_weight=2.0, undesirable_weight=0.5)
    )
    expected = [2 * (1 - 0.731059), 0.5 * (1 - 0.182426), 0.5 * (1 - 0.731059)]
    np.testing.assert_allclose(loss, expected, atol=1e-6)


def test_the_reference_point_is_not_below_zero() -> None:
    values = np.array([1.0, 3.0], np.float32)
    assert reference_point(values, np.zeros(2, np.float32)) == 2.0
    assert reference_point(-values, np.zeros(2, np.float32)) == 0.0


def test_scores_by_hand() -> None:
    rewards = np.array([0.5, 0.0, -1.0, 2.0])
    scores = answer_scores(rewards, np.array([True, True, False, False]))
    assert scores == {
        "accuracy": (1 + 0.5 + 1 + 0) / 4,
        "margin": 0.25 - 0.5,
        "desirable_reward": 0.25,
        "undesirable_reward": 0.5,
    }
    one = answer_scores(rewards, np.ones(4, np.bool_))
    assert one == {"accuracy": 2.5 / 4, "desirable_reward": 0.375}


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config(
        task={"name": "kto"}, training={"max_steps": 2, "batch_size": 6}, lora={"dropout": 0.1}
    )


def adapter(config: Config, seed: int) -> Params:
    rng = np.random.default_rng(seed)
    start = load_model(config).initial
    return {n: rng.normal(0, 0.2, v.shape).astype(np.float32) for n, v in start.items()}


@torch.no_grad()
def log_probs(config: Config, params: Params | None, rows: Any) -> np.ndarray:
    """log p of each row's answer, one by one; None: of the base model."""
    model = load_model(config)
    model.load(params if params is not None else model.initial)
    model.peft.eval()
    values = []
    for i in range(len(rows)):
        tokens, supervised = rows[i]
        scores = model.peft(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
        scores = scores.double().log_softmax(-1)
        values.append(sum(float(scores[t - 1, tokens[t]]) for t in np.flatnonzero(supervised)))
    return np.array(values)


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_client_scores_its_own_answers(
    with_reference: bool, config: Config, tmp_path: Path
) -> None:
    held_out, params = random_answers(9, seed=3), adapter(config, 1)
    reference = adapter(config, 2) if with_reference else None
    sent = {} if reference is None else {"reference": reference}
    scores = evaluate_locally(
        Assignment(1, params, 0.0, config, sent),
        ClientData("a", random_answers(3), held_out),
        tmp_path,
    )
    mixed = held_out.mismatched(np.arange(9), 64)
    ratio, others = (
        log_probs(config, params, rows) - log_probs(config, reference, rows)
        for rows in (held_out.rows, mixed)
    )
    z0, beta = max(0.0, others.mean()), config.kto.beta
    gain = np.where(held_out.desirable, ratio - z0, z0 - ratio)
    expected = {"loss": (1 - 1 / (1 + np.exp(-beta * gain))).mean(), "kl": z0}
    expected |= answer_scores(beta * ratio, held_out.desirable)
    assert scores == pytest.approx(expected, abs=1e-4)


def test_a_step_does_not_depend_on_its_micro_batches(config: Config, tmp_path: Path) -> None:
    """The reference point is that of the whole step, also for micro-batches of one answer."""
    config = changed(config, lora={"dropout": 0.0})
    answers, start = random_answers(20), adapter(config, 1)
    deltas = []
    for size in (1, 3, 6):
        chosen = changed(config, training={"micro_batch_size": size})
        assignment = Assignment(1, start, 1e-2, chosen)
        folder = tmp_path / str(size)
        deltas.append(train_locally(assignment, ClientData("a", answers, answers), folder).delta)
    for delta in deltas[1:]:
        for name, value in delta.items():
            np.testing.assert_allclose(value, deltas[0][name], atol=2e-5)


def test_a_repeated_round_ends_in_the_same_bits(config: Config, tmp_path: Path) -> None:
    answers, params = random_answers(20), load_model(config).initial
    data = ClientData("a", answers, answers)
    first = train_locally(Assignment(1, params, 1e-2, config, run="r"), data, tmp_path)
    again = Assignment(
        2, add(params, first.delta), 1e-2, config, run="r", acknowledged=Acknowledged(1, 1)
    )
    one, other = (train_locally(again, data, tmp_path) for _ in range(2))
    for name, value in one.delta.items():
        np.testing.assert_array_equal(value, other.delta[name])
    assert one.metrics["kl"] >= 0


# --- what is refused, and what is said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.batch_size=1"], "an optimizer step needs two answers or more"),
        (["kto.beta=0"], r"kto\.beta must be > 0, got 0"),
        (["kto.desirable_weight=0"], r"kto\.desirable_weight must be > 0"),
        (["kto.undesirable_weight=-1"], r"kto\.undesirable_weight must be > 0"),
        (["training.packing=true"], "works with task=sft only"),
        (["kto.reference_adapter=nowhere"], "no adapter_config.json there"),
        (["data.columns.answer=prompt"], "are the same column"),
    ],
)
def test_wrong_settings(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(["task=kto", *overrides])


def test_two_steps_of_one_answer_are_one_of_two() -> None:
    options = ["training.batch_size=1", "training.gradient_accumulation_steps=2"]
    assert compose(["task=kto", *options]).task.name == "kto"


def with_labels(desirable: int, undesirable: int) -> Any:
    """A simulation's data with so many answers of each kind."""
    answers = random_answers(desirable + undesirable)
    verdicts = np.arange(len(answers)) < desirable
    return SimpleNamespace(encoded=EncodedAnswers(answers.rows, verdicts, answers.report))


def test_remarks_on_unequal_numbers() -> None:
    config, task = Config(), find("kto")
    assert task.remarks(config, with_labels(6, 6)) == []
    (line,) = task.remarks(config, with_labels(9, 3))
    assert line.endswith("recommends kto.undesirable_weight from 2.25 to 3.00")
    assert task.remarks(changed(config, kto={"undesirable_weight": 2.5}), with_labels(9, 3)) == []
    (line,) = task.remarks(config, with_labels(0, 5))
    assert "all 5 answers are undesirable" in line


def test_a_site_bounds_the_weights() -> None:
    """A weight near 0 would make an update of the few answers of one kind."""
    config = changed(Config(), task={"name": "kto"}, training={"batch_size": 16})
    policy = Policy()
    assert "kto" in (policy.tasks or ())
    policy.check(config, 1)
    tilted = changed(config, kto={"undesirable_weight": 1e-6})
    with pytest.raises(RefusedError, match=r"kto\.undesirable_weight=1e-06.*0\.1 to 10"):
        policy.check(tilted, 1)
    with pytest.raises(RefusedError, match="task=kto"):
        Policy(tasks=("sft",)).check(config, 1)
    policy.check(changed(tilted, task={"name": "dpo"}), 1)
