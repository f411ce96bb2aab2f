"""What does not fit is refused or warned of before a run; the rest of the table: test_errors."""

import socket
import time
from pathlib import Path

import numpy as np
import pytest

from fedllm_flwr.config.compose import compose
from fedllm_flwr.config.schema import ModelConfig, TrackingConfig
from fedllm_flwr.data.client_data import simulated_data
from fedllm_flwr.data.encode import encode
from fedllm_flwr.data.overlap import _beginning, _words, overlap
from fedllm_flwr.data.records import Messages
from fedllm_flwr.data.sources import Records
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.base_facts import ModelKey, base_facts
from fedllm_flwr.models.tokenizer import load_tokenizer
from fedllm_flwr.reporting import trackers
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.runs.fit import fit_warnings, scored_on_one
from fedllm_flwr.server.run import run_on_grid
from fedllm_flwr.simulation.inprocess import InProcessGrid
from fedllm_flwr.tasks import find
from fedllm_flwr.tasks.sft.records import Example
from fedllm_flwr.training.batches import split_step
from tiny_runs import tiny


def test_facts_of_the_embedded_model_are_those_of_its_files() -> None:
    facts = base_facts(ModelKey.of(ModelConfig()))
    assert (facts.model_type, facts.context, facts.vocabulary) == ("llama", 512, 2048)
    assert facts.layers["model.layers.0.mlp.down_proj"] == min(448, 192)
    assert facts.output_layer == "lm_head"
    assert len(facts.layers) == 4 * 7 + 2


def _records(texts: list[str]) -> Records:
    turns = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
        for text in texts
    ]
    return Records.of([Example(messages, "", "", -1) for messages in turns])


def test_overlap_counts_equal_and_nearly_equal_records() -> None:
    words = np.random.default_rng(0).integers(0, 5000, (60, 30))
    train = [" ".join(f"w{word}" for word in row) for row in words]
    shouted = train[0].upper() + "!"  # the same words
    changed = train[1].replace(train[1].split()[15], "other")  # one word of thirty
    half = " ".join([*train[2].split()[:15], *(f"x{i}" for i in range(15))])
    unseen = [" ".join(f"y{i}z{j}" for j in range(30)) for i in range(17)]
    found = overlap(_records(train), _records([shouted, changed, half, *unseen]))
    assert (found.num_held_out, found.equal, found.near) == (20, 1, 1)


def test_beginnings_are_those_of_the_whole_text() -> None:
    """The first words decide which texts are compared as a whole: they are never cut."""
    chance = np.random.default_rng(1)
    pieces = ["a", "bc", "ß", "İ", "ŉ", "Σ", ".", "--", " ", "   ", "\n", "!" * 120, "w" * 130]
    for _ in range(2000):
        text = "".join(chance.choice(pieces, chance.integers(0, 40)))
        assert _beginning(text) == tuple(_words(text)[:5])


def test_what_all_records_share_makes_none_of_them_a_duplicate() -> None:
    question = "What is the sentiment of this news, please choose from negative neutral positive: "
    train = _records([question + f"a{i} b{i} c{i} d{i} e{i} f{i}" for i in range(40)])
    held_out = _records([question + f"g{i} h{i} j{i} k{i} l{i} m{i}" for i in range(40)])
    assert overlap(train, held_out).share == 0


def test_plan_warns_of_few_scores_and_of_a_batch_beyond_the_data() -> None:
    config = compose(tiny("training.batch_size=80"))
    data = simulated_data(config, find("sft").records, load_tokenizer(config.model))
    lines = fit_warnings(config, data, data.source.eval)
    assert [line for line in lines if "a step takes 80 examples" in line]
    assert [line for line in lines if f"±{0.98 / 10**0.5:.2f}" in line]  # of 10 records
    config = compose(["training.batch_size=16"])
    data = simulated_data(config, find("sft").records, load_tokenizer(config.model))
    assert fit_warnings(config, data, data.source.eval) == []  # the demo as it comes


def test_clients_that_score_on_one_record_are_named() -> None:
    config = compose(["evaluation.clients=true", "data.validation_fraction=0.05"])
    lines = scored_on_one(config, {"ant": 20, "bee": 60})  # of 21 records 1 is held back, of 63 3
    assert len(lines) == 1
    assert "ant score" in lines[0]
    assert scored_on_one(compose(), {"ant": 20}) == []


def test_flower_simulation_of_another_size_is_refused_with_the_line_to_paste(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedllm_flwr.client.app import app

    monkeypatch.setattr("fedllm_flwr.server.run._NODES_S", 0.0)
    config = compose(tiny("federation.engine=inprocess", f"output_dir={tmp_path / 'run'}"))
    grid = InProcessGrid(app, 10)
    with pytest.raises(ConfigError, match=r"flwr run x --federation-config 'num-supernodes=3'"):
        run_on_grid(config, grid, Console(quiet=True), run_id=1, command="flwr run x")
    assert list(tmp_path.iterdir()) == []


def test_mlflow_that_does_not_answer_is_found_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if it were installed
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:\d+ does not respond"):
        trackers.check_trackers(TrackingConfig(mlflow=True))
    assert time.monotonic() - started < 2 * trackers._CONNECT_S


@pytest.mark.parametrize("count", [1, 7, 250, 1000])
def test_steps_of_many_examples_are_divided_without_a_table_of_all(count: int) -> None:
    rng = np.random.default_rng(count)
    lengths = rng.integers(5, 300, 400)
    indices = rng.integers(0, 400, 1000).tolist()
    batches = split_step(indices, lengths, count)
    assert len(batches) == count
    assert sorted(index for batch in batches for index in batch) == sorted(indices)
    allowed = -(-1000 // count) * int(lengths[indices].max())
    assert max(len(batch) * int(lengths[batch].max()) for batch in batches) <= allowed


@pytest.mark.parametrize("truncation", ["right", "left", "drop"])
@pytest.mark.parametrize("long_part", ["question", "answer"])
def test_a_book_is_cut_before_it_is_tokenised_and_keeps_its_tokens(
    truncation: str, long_part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = "".join(f"In year {i} the bank's profit rose by {i % 7} %.\n" for i in range(4000))
    texts = {"question": "Is it so?", "answer": "Yes."} | {long_part: book}
    record: Messages = [
        {"role": "user", "content": texts["question"]},
        {"role": "assistant", "content": texts["answer"]},
    ]
    tokenizer = load_tokenizer(ModelConfig())
    found = encode([record], tokenizer, "alpaca", 128, truncation)
    monkeypatch.setattr("fedllm_flwr.data.tokens._shortened", lambda parts, *_: parts)
    whole = encode([record], tokenizer, "alpaca", 128, truncation)
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    np.testing.assert_array_equal(found.supervised, whole.supervised)
    assert found.report == whole.report


def test_text_of_few_tokens_for_many_characters_is_tokenised_whole() -> None:
    """Spaces in a row are one token for some tokenizers: no bound on characters holds then."""
    spaces = "a" + " " * 300_000 + "b"
    record: Messages = [
        {"role": "user", "content": spaces},
        {"role": "assistant", "content": "Yes."},
    ]
    tokenizer = load_tokenizer(ModelConfig())
    encoded = encode([record], tokenizer, "alpaca", 512, "left")
    assert len(encoded) == 1
    assert encoded.report.num_tokens <= 512
