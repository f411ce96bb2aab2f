"""Reference log-probabilities: what they are, that each is computed once, and who may use them."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from fedllm_flwr.client.local_round import train_locally
from fedllm_flwr.config import Config, changed
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.federation.messages import Acknowledged, Assignment, Update
from fedllm_flwr.federation.tensor_files import load_params
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.params import Params, add
from fedllm_flwr.tasks.dpo.pairs import EncodedPairs
from fedllm_flwr.tasks.preferences.reference import ReferenceCache, reference_log_probs
from fedllm_flwr.training.schedule import draw_examples
from toy_pairs import as_pairs, one_by_one, random_pairs

MakeConfig = Callable[..., Config]


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config(
        task={"name": "dpo"}, training={"max_steps": 2, "batch_size": 4}, lora={"dropout": 0.1}
    )


@pytest.fixture
def model(config: Config) -> AdaptedModel:
    model = load_model(config)
    model.load(random_adapter(model, seed=1))  # what happens to be in the model must not matter
    return model


@pytest.fixture(scope="module")
def pairs() -> EncodedPairs:
    return random_pairs(30)


def random_adapter(model: AdaptedModel, seed: int) -> Params:
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, 0.2, v.shape).astype(np.float32) for n, v in model.initial.items()}


def base_model(config: Config) -> Any:
    return AutoModelForCausalLM.from_pretrained(config.model.path).eval()


def everything(pairs: EncodedPairs) -> np.ndarray:
    return np.arange(len(pairs))


@contextmanager
def counted_rows(model: AdaptedModel) -> Iterator[list[int]]:
    """Rows of every forward pass through the base model."""
    rows: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows.append(len(kwargs["input_ids"]))

    handle = model.peft.get_base_model().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_the_reference_is_the_base_model(
    batch_tokens: int, config: Config, model: AdaptedModel, pairs: EncodedPairs
) -> None:
    values = reference_log_probs(model, None, pairs.rows, batch_tokens).reshape(-1, 2)
    assert values.shape == (30, 2)
    np.testing.assert_allclose(values, one_by_one(base_model(config), pairs), atol=1e-4)


def test_the_reference_is_a_given_adapter(
    config: Config, model: AdaptedModel, pairs: EncodedPairs
) -> None:
    adapter = random_adapter(model, seed=2)
    values = reference_log_probs(model, adapter, pairs.rows, 300).reshape(-1, 2)
    base = one_by_one(base_model(config), pairs)
    assert np.abs(values - base).max() > 1
    model.load(adapter)
    np.testing.assert_allclose(values, one_by_one(model.peft, pairs), atol=1e-4)


def test_the_adapter_works_again_after_the_reference(
    config: Config, model: AdaptedModel, pairs: EncodedPairs
) -> None:
    """Neither the adapter's tensors nor that it is in use, nor trainable, is lost."""
    before, expected = model.params(), one_by_one(model.peft, pairs)
    reference_log_probs(model, None, pairs.rows, 300)
    np.testing.assert_array_equal(one_by_one(model.peft, pairs), expected)
    assert all(np.array_equal(value, before[name]) for name, value in model.params().items())
    assert set(model.trainable()) == set(before)


def test_kept_values_equal_fresh_ones_however_they_were_padded(
    model: AdaptedModel, pairs: EncodedPairs
) -> None:
    """Drawn in two rounds, with other neighbours and other padding than all at once."""
    order = np.random.default_rng(0).permutation(len(pairs))
    remembered = ReferenceCache(100).of(model, None, pairs, order[:13])
    kept = ReferenceCache(700, remembered).of(model, None, pairs, order).tensors["values"]
    for batch_tokens in (1, 2048):
        fresh = reference_log_probs(model, None, pairs.rows, batch_tokens).reshape(-1, 2)
        np.testing.assert_allclose(kept, fresh, rtol=0, atol=1e-5 * float(np.abs(fresh).max()))
        per_token = np.abs(kept - fresh) / answer_lengths(pairs)
        assert per_token.max() < 1e-5


def answer_lengths(pairs: EncodedPairs) -> np.ndarray:
    return np.array([[int(supervised.sum()) for _, supervised in pairs[i]] for i in range(30)])


def test_each_pair_is_computed_once(model: AdaptedModel, pairs: EncodedPairs) -> None:
    seen: set[int] = set()
    remembered: Params | None = None
    for updates in range(7):
        drawn = draw_examples(len(pairs), 8, updates, 0, "a")
        with counted_rows(model) as rows:
            remembered = ReferenceCache(300, remembered).of(model, None, pairs, drawn)
        assert sum(rows) == 2 * len(set(drawn.tolist()) - seen)
        seen |= set(drawn.tolist())
    assert len(seen) == len(pairs)  # the last rounds computed nothing


def test_a_repeated_round_gives_the_same_bits(model: AdaptedModel, pairs: EncodedPairs) -> None:
    first = ReferenceCache(100).of(model, None, pairs, np.array([0, 1, 2, 3]))

    def second() -> bytes:
        cache, order = ReferenceCache(100, first), np.array([3, 9, 20])
        return cache.of(model, None, pairs, order).tensors["values"].tobytes()

    before = second()
    with counted_rows(model) as rows:
        assert second() == before
    assert sum(rows) == 4  # computed again, with the same neighbours as then


def other_tokens(pairs: EncodedPairs) -> EncodedPairs:
    return random_pairs(len(pairs), seed=9)


def other_boundary(pairs: EncodedPairs) -> EncodedPairs:
    """The same tokens; the answers begin one token later."""
    rows = [tokens for i in range(len(pairs)) for tokens, _ in pairs[i]]
    lengths = [int(s.sum()) for i in range(len(pairs)) for _, s in pairs[i]]
    return as_pairs(rows, [max(1, length - 1) for length in lengths])


def fewer(pairs: EncodedPairs) -> EncodedPairs:
    return pairs.take(np.arange(len(pairs) - 1))


@pytest.mark.parametrize("change", [other_tokens, other_boundary, fewer])
def test_values_of_other_pairs_are_not_used(
    change: Callable[[EncodedPairs], EncodedPairs],
    model: AdaptedModel,
    pairs: EncodedPairs,
    caplog: pytest.LogCaptureFixture,
) -> None:
    remembered = ReferenceCache(300).of(model, None, pairs, everything(pairs))
    others = change(pairs)
    with caplog.at_level(logging.WARNING):
        kept = ReferenceCache(300, remembered).of(model, None, others, everything(others))
    np.testing.assert_array_equal(
        kept.tensors["values"],
        reference_log_probs(model, None, others.rows, 300).reshape(-1, 2),
    )
    assert "remembered log-probabilities are not used" in caplog.text


def test_values_of_another_reference_are_not_used(
    model: AdaptedModel, pairs: EncodedPairs, caplog: pytest.LogCaptureFixture
) -> None:
    remembered: Params | None = None
    for adapter in (None, random_adapter(model, 2), random_adapter(model, 3)):
        cache = ReferenceCache(300, remembered)
        with caplog.at_level(logging.WARNING):
            remembered = cache.of(model, adapter, pairs, everything(pairs))
        expected = reference_log_probs(model, adapter, pairs.rows, 300).reshape(-1, 2)
        np.testing.assert_array_equal(remembered.tensors["values"], expected)
    assert caplog.text.count("are not used") == 2


def task_of(server_round: int, params: Params, config: Config, **options: Any) -> Assignment:
    """A task of a client whose updates of all earlier rounds were accepted."""
    before = Acknowledged(server_round - 1, server_round - 1)
    return Assignment(server_round, params, 1e-2, config, acknowledged=before, **options)


def federate(config: Config, pairs: EncodedPairs, folder: Path, **options: Any) -> list[Update]:
    """Three rounds of FedAvg over one client: each starts where the one before ended."""
    params, updates = load_model(config).initial, []
    for server_round in (1, 2, 3):
        task = task_of(server_round, params, config, **options)
        updates.append(train_locally(task, ClientData("a", pairs, pairs), folder))
        params = add(params, updates[-1].delta)
    return updates


def test_the_reference_stays_the_base_over_rounds(
    config: Config, pairs: EncodedPairs, tmp_path: Path
) -> None:
    updates = federate(config, pairs, tmp_path)
    base, drawn = one_by_one(base_model(config), pairs), drawn_until(config, pairs)
    for server_round in (2, 3):
        stored = load_params(tmp_path / f"round-{server_round:05d}.safetensors")[0]
        kept = stored["reference"]
        assert set(np.flatnonzero(kept["known"])) == drawn[server_round]
        chosen = sorted(drawn[server_round])
        np.testing.assert_allclose(kept["values"][chosen], base[chosen], atol=1e-4)
    # An adapter of a later round is far from the base, so that its copy would have been seen.
    model = load_model(config)
    model.load(add(model.initial, updates[0].delta))
    assert np.abs(one_by_one(model.peft, pairs) - base).max() > 0.1


def drawn_until(config: Config, pairs: EncodedPairs) -> dict[int, set[int]]:
    drawn: dict[int, set[int]] = {0: set()}
    for server_round in (1, 2, 3):
        now = draw_examples(len(pairs), 8, server_round - 1, config.seed, "a").tolist()
        drawn[server_round] = drawn[server_round - 1] | set(now)
    return drawn


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_what_is_lost_on_disk_is_computed_again(
    damage: str, config: Config, pairs: EncodedPairs, tmp_path: Path
) -> None:
    whole = federate(config, pairs, tmp_path / "whole")
    params = load_model(config).initial
    first = train_locally(task_of(1, params, config), ClientData("a", pairs, pairs), tmp_path)
    (file,) = tmp_path.glob("round-*")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-9])
    asked = task_of(2, add(params, first.delta), config)
    update = train_locally(asked, ClientData("a", pairs, pairs), tmp_path)
    assert not update.lost  # nothing that the server would have to know of
    for name, value in whole[1].delta.items():
        np.testing.assert_allclose(update.delta[name], value, atol=1e-5)


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
def test_margins_of_every_round_are_against_the_same_reference(
    with_adapter: bool, config: Config, pairs: EncodedPairs, tmp_path: Path
) -> None:
    """One step a round: its margin is that of the adapter which the round starts from."""
    config = changed(config, training={"max_steps": 1})
    model = load_model(config)
    adapter = random_adapter(model, 4) if with_adapter else None
    if adapter is None:
        reference = one_by_one(base_model(config), pairs)
    else:
        model.load(adapter)
        reference = one_by_one(model.peft, pairs)
    params = random_adapter(model, 6)
    for server_round in (1, 2, 3):
        task = task_of(
            server_round, params, config, sent={} if adapter is None else {"reference": adapter}
        )
        update = train_locally(task, ClientData("a", pairs, pairs), tmp_path)
        model.load(params)
        rewards = config.dpo.beta * (one_by_one(model.peft, pairs) - reference)
        drawn = draw_examples(len(pairs), 4, server_round - 1, config.seed, "a")
        margins = (rewards[:, 0] - rewards[:, 1])[drawn]
        assert update.metrics["margin"] == pytest.approx(margins.mean(), abs=1e-4)
        assert update.metrics["accuracy"] == (margins > 0).mean()
        params = add(params, update.delta)
