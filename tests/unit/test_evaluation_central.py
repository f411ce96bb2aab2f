"""Loss, perplexity, accuracies and F1 of an adapter; evaluation at a client."""

import math
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from fedllm_flwr.client.local_evaluation import evaluate_locally
from fedllm_flwr.client.local_round import train_locally
from fedllm_flwr.config import Config
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.data.encode import Encoded, encode
from fedllm_flwr.errors import DataError
from fedllm_flwr.evaluation.central import evaluate
from fedllm_flwr.federation.messages import Assignment
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.models.scoring import Question, score, score_examples
from fedllm_flwr.tasks.sft.held_out import (
    EvaluationSet,
    classification_scores,
    make_evaluation_set,
)

LABELS = ["bad", "good", "so-so"]
MakeConfig = Callable[..., Config]
MakeExamples = Callable[..., Encoded]


def records(answers: list[str]) -> datasets.Dataset:
    """One record per answer; the question names its index."""
    return datasets.Dataset.from_dict(
        {
            "messages": [
                [
                    {"role": "user", "content": f"Item {i}"},
                    {"role": "assistant", "content": answer},
                ]
                for i, answer in enumerate(answers)
            ],
            "choice": [LABELS.index(a) if a in LABELS else -1 for a in answers],
        }
    )


def evaluation_set(config: Config, answers: list[str]) -> EvaluationSet:
    rows, tokenizer = records(answers), load_model(config).tokenizer
    encoded = encode(rows["messages"][:], tokenizer, config.data.template, 256)
    return make_evaluation_set(config, tokenizer, rows, encoded)


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config(
        data={"labels": LABELS, "template": "vicuna"},
        training={"max_length": 256, "max_steps": 10, "batch_size": 4},
        lora={"target_modules": "all-linear", "r": 16, "dropout": 0.0},
    )


def test_scores_by_hand() -> None:
    """Class 0: precision 2/3, recall 2/3; class 1: 1/2, 1/1; class 2: none found, one missed."""
    targets, predicted = np.array([0, 0, 0, 1, 2]), np.array([0, 0, 1, 1, 0])
    scores = classification_scores(predicted, targets)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_f1_of_classes_that_occur() -> None:
    scores = classification_scores(np.array([0, 0, 0]), np.array([0, 0, 0]))
    assert scores == {"accuracy": 1.0, "macro_f1": 1.0}


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_scores_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predicted, targets = np.array(pairs).T
    scores = classification_scores(predicted, targets)
    expected = f1_score(targets, predicted, average="macro", zero_division=0)
    assert scores["macro_f1"] == pytest.approx(expected)
    assert scores["accuracy"] == pytest.approx(accuracy_score(targets, predicted))


def test_evaluate_puts_the_scores_together(config: Config) -> None:
    data = evaluation_set(config, ["bad", "good", "unknown", "so-so", "good"])
    model = load_model(config)
    scores = evaluate(model, model.initial, data, 2048, 1)

    tokens = score_examples(model, data.examples, 2048)
    assert scores["loss"] == pytest.approx(tokens.loss)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["token_accuracy"] == tokens.token_accuracy
    assert data.choices is not None
    assert data.targets.tolist() == [0, 1, 2, 1]  # "unknown" is no label
    questions = [*map(Question, data.choices.prompts, data.choices.answers)]
    likelihoods = [[s.log_prob for s in some] for some in score(model, questions, 2048)]
    assert scores["accuracy"] == (np.argmax(likelihoods, 1) == data.targets).mean()


def test_without_labels_there_is_no_accuracy(config: Config) -> None:
    data = evaluation_set(config, ["something", "else"])
    assert data.choices is None
    model = load_model(config)
    scores = evaluate(model, model.initial, data, 2048, 1)
    assert scores.keys() == {"loss", "perplexity", "token_accuracy"}


def test_batch_tokens_do_not_change_the_scores(config: Config) -> None:
    data, model = evaluation_set(config, LABELS * 5), load_model(config)
    one = evaluate(model, model.initial, data, 1, 1)
    many = evaluate(model, model.initial, data, 100_000, 1)
    assert one == pytest.approx(many, abs=1e-5, rel=1e-5)


def test_training_on_an_answer_shows_in_every_score(config: Config, tmp_path: Path) -> None:
    """The longest label is the least likely one before, and the only one learnt."""
    data, model = evaluation_set(config, ["so-so"] * 6), load_model(config)
    before = evaluate(model, model.initial, data, 2048, 1)
    params = model.initial
    for server_round in (1, 2, 3):
        task = Assignment(server_round, params, 1e-2, config)
        update = train_locally(task, ClientData("a", data.examples, data.examples), tmp_path)
        params = {name: params[name] + update.delta[name] for name in params}
    after = evaluate(model, params, data, 2048, 1)

    assert (before["accuracy"], before["macro_f1"]) == (0.0, 0.0)
    assert (after["accuracy"], after["macro_f1"]) == (1.0, 1.0)
    assert after["loss"] < 0.6 * before["loss"]
    assert after["token_accuracy"] > 0.8 > before["token_accuracy"]


def test_a_client_scores_what_it_holds_back(
    make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    config, held_out = make_config(), random_examples(6)
    model = load_model(config)
    task = Assignment(1, model.initial, 1e-2, config)
    scores = evaluate_locally(task, ClientData("a", random_examples(1), held_out), tmp_path)
    tokens = score_examples(model, held_out, 2048)
    expected = {"loss": tokens.loss, "token_accuracy": tokens.token_accuracy}
    assert scores == pytest.approx(expected)


def test_a_client_that_holds_nothing_back(
    make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    config, nothing = make_config(), random_examples(1).take(np.empty(0, np.int64))
    task = Assignment(1, load_model(config).initial, 1e-2, config)
    with pytest.raises(DataError, match=r"desk-1 holds no examples back.*validation_fraction"):
        evaluate_locally(task, ClientData("desk-1", random_examples(1), nothing), tmp_path)
