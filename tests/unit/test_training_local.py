"""One client's round: its bits, its counts, and what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedllm_flwr.client.local_round import train_locally
from fedllm_flwr.config import Config, changed
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.errors import ConfigError, DataError, FederationError, FedLLMError, ModelError
from fedllm_flwr.federation.algorithms.fedavg import FedAvg
from fedllm_flwr.federation.messages import Acknowledged, Assignment, Update
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.params import Groups, Params
from fedllm_flwr.training.local_terms import LocalTerms

MakeConfig = Callable[..., Config]
MakeExamples = Callable[..., Encoded]


def task(config: Config, server_round: int = 1) -> Assignment:
    """A task of a client whose updates of all earlier rounds were accepted."""
    before = Acknowledged(server_round - 1, server_round - 1)
    return Assignment(server_round, load_model(config).initial, 1e-2, config, acknowledged=before)


def client(name: str, examples: Encoded) -> ClientData:
    return ClientData(name, examples, examples)


def bits(params: Params) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in params.items()}


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config(training={"max_steps": 2, "batch_size": 8}, lora={"dropout": 0.1})


def test_the_same_task_gives_the_same_bits_whatever_ran_before(
    config: Config, random_examples: MakeExamples, tmp_path: Path
) -> None:
    """Neither other clients, nor their order, nor the state of the global generators matter."""
    clients = [client(name, random_examples(20 + i, seed=i)) for i, name in enumerate("abc")]
    first = {c.name: bits(train_locally(task(config), c, tmp_path).delta) for c in clients}
    torch.manual_seed(99)
    np.random.seed(99)
    again = {c.name: bits(train_locally(task(config), c, tmp_path).delta) for c in clients[::-1]}
    assert first == again
    assert len({frozenset(delta.items()) for delta in first.values()}) == 3


def test_rounds_clients_and_seeds_draw_other_examples_and_other_dropout(
    make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    options = {"training": {"max_steps": 1, "batch_size": 8}}
    for dropout, count in ((0.0, 20), (0.3, 8)):  # eight examples: the same batch every time
        config = make_config(lora={"dropout": dropout}, **options)
        examples = random_examples(count)
        params = load_model(config).initial
        tasks = [
            (Assignment(1, params, 1e-2, config), "a"),
            (Assignment(2, params, 1e-2, config, acknowledged=Acknowledged(1, 1)), "a"),
            (Assignment(1, params, 1e-2, config), "b"),
            (Assignment(1, params, 1e-2, replace(config, seed=1)), "a"),
        ]
        deltas = {
            frozenset(bits(train_locally(asked, client(name, examples), tmp_path).delta).items())
            for asked, name in tasks
        }
        assert len(deltas) == len(tasks)


def test_a_repeated_scaffold_round_gives_the_same_bits(
    config: Config, random_examples: MakeExamples, tmp_path: Path
) -> None:
    data = client("a", random_examples(20))
    control = {n: np.full_like(v, 0.01) for n, v in load_model(config).initial.items()}

    def run(server_round: int) -> Update:
        scaffold = changed(config, algorithm={"name": "scaffold"})
        asked = replace(task(scaffold, server_round), sent={"control": control})
        return train_locally(asked, data, tmp_path)

    run(1)
    two, repeated = run(2), run(2)
    assert bits(two.delta) == bits(repeated.delta)
    changes = [update.contributed["control_delta"] for update in (two, repeated)]
    assert bits(changes[0]) == bits(changes[1])


def test_groups_of_tensors_are_those_that_the_algorithm_asks_for(
    config: Config, random_examples: MakeExamples, tmp_path: Path
) -> None:
    scaffold = changed(config, algorithm={"name": "scaffold"})
    data = client("a", random_examples(5))
    with pytest.raises(FederationError, match="it lacks 'control', which the algorithm needs"):
        train_locally(task(scaffold), data, tmp_path)
    foreign = replace(task(config), sent={"control": load_model(config).initial})
    with pytest.raises(FederationError, match="it contains 'control', which neither the"):
        train_locally(foreign, data, tmp_path)


def test_only_the_tensors_that_a_rule_trains_change(
    config: Config, random_examples: MakeExamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an algorithm would that freezes A (Sun et al. 2024)."""

    def only_b(rule: FedAvg, received: Groups, memory: Groups) -> LocalTerms:
        return LocalTerms(received["params"], trains=lambda name: "lora_B" in name)

    data = client("a", random_examples(20))
    before = train_locally(task(config), data, tmp_path / "plain")
    monkeypatch.setattr(FedAvg, "local_terms", only_b)
    delta = train_locally(task(config), data, tmp_path / "frozen").delta
    assert all(value.any() == ("lora_B" in name) for name, value in delta.items())
    monkeypatch.undo()
    after = train_locally(task(config), data, tmp_path / "plain")
    assert bits(after.delta) == bits(before.delta)  # A is trainable again


def test_what_a_round_reports(
    config: Config, random_examples: MakeExamples, tmp_path: Path
) -> None:
    examples = random_examples(40)
    update = train_locally(task(config), client("a", examples), tmp_path)
    metrics = update.metrics
    assert (update.num_examples, metrics["steps"], update.contributed) == (16, 2.0, {})
    assert 16 * 6 <= metrics["tokens"] <= metrics["computed_tokens"] <= 1.4 * metrics["tokens"]
    assert metrics["loss"] > 0
    assert metrics["seconds"] > 0
    assert all(value.dtype == np.float32 for value in update.delta.values())
    assert list(tmp_path.iterdir()) == []


def test_few_examples_come_more_than_once_and_count_once(
    config: Config, random_examples: MakeExamples, tmp_path: Path
) -> None:
    update = train_locally(task(config), client("a", random_examples(3)), tmp_path)
    assert update.num_examples == 3


def test_epochs_set_the_number_of_steps(
    make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    training = {"max_steps": -1, "num_epochs": 2.0, "batch_size": 4}
    update = train_locally(
        task(make_config(training=training)), client("a", random_examples(10)), tmp_path
    )
    assert (update.num_examples, update.metrics["steps"]) == (10, 5.0)


def test_the_number_of_threads_is_given_back(
    config: Config, random_examples: MakeExamples, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    config = changed(config, federation={"client_cpus": before + 1})
    train_locally(task(config), client("a", random_examples(3)), tmp_path)
    assert torch.get_num_threads() == before


def test_a_diverged_client_reports_so(
    make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    """The last good loss would look like a success."""
    config = make_config(training={"max_steps": 4, "optimizer": "sgd", "max_grad_norm": 0.0})
    asked = replace(task(config), learning_rate=1e30)
    update = train_locally(asked, client("a", random_examples(20)), tmp_path)
    assert not np.isfinite(update.metrics["loss"])


def refused(config: Config, examples: Encoded, tmp_path: Path) -> FedLLMError:
    with pytest.raises(FedLLMError) as raised:
        train_locally(task(config), client("desk-3", examples), tmp_path)
    assert "\n" not in str(raised.value)
    return raised.value


def test_no_example(config: Config, random_examples: MakeExamples, tmp_path: Path) -> None:
    nothing = random_examples(3).take(np.empty(0, np.int64))
    error = refused(config, nothing, tmp_path)
    assert isinstance(error, DataError)
    assert "desk-3 has no usable training example" in str(error)


def test_tokens_that_the_model_does_not_know(
    config: Config, random_examples: MakeExamples, tmp_path: Path
) -> None:
    examples = random_examples(5)
    examples.tokens[7] = 259
    error = refused(config, examples, tmp_path)
    assert isinstance(error, ModelError)
    assert "produces token id 259, but the model has 259 embeddings" in str(error)


def test_examples_beyond_the_context(
    make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    config = make_config(training={"max_length": 600})
    error = refused(config, random_examples(2, shortest=513, longest=513), tmp_path)
    assert isinstance(error, ConfigError)
    assert "training.max_length=600, but the model takes 512 tokens" in str(error)
    assert "set training.max_length=512" in str(error)
