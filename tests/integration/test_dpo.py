"""Preference alignment of the tiny model from end to end, with every algorithm."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from fedllm_flwr.config.compose import compose
from fedllm_flwr.data.client_data import simulated_client, simulated_data
from fedllm_flwr.data.encode import encode_prompts
from fedllm_flwr.errors import RunInterrupted
from fedllm_flwr.federation.state import newest_round
from fedllm_flwr.federation.tensor_files import load_params
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.models.generation import Decoding, as_text, generate
from fedllm_flwr.models.tokenizer import load_tokenizer, model_source
from fedllm_flwr.params import Params
from fedllm_flwr.tasks import task_of
from tiny_runs import (
    ADAPTER,
    ALGORITHMS,
    NUM_CLIENTS,
    interrupting,
    outcome,
    records,
    resume,
    run_intercepted,
    run_tiny,
    tiny,
)

WholeRun = Callable[..., Path]

DPO = (
    "task=dpo",
    "evaluation.answers=2",
    "evaluation.max_new_tokens=8",
    "checkpoint.keep=3",
    "training.max_steps=4",
    "training.learning_rate=0.005",
)
OPTIONS = {
    "fedprox": ("algorithm.mu=1",),  # enough to be seen, and to learn
    "centralized": ("federation.num_clients=1", "federation.sample_clients=1"),
}
# Together; what is special of theirs is in fedavg, local and scaffold.
SLOWLY = ("fedprox", "fedavgm", "fedadagrad", "fedyogi", "fedadam", "centralized")
SCORES = {
    *("loss", "accuracy", "margin", "chosen_reward", "rejected_reward"),
    *("chosen_log_prob", "rejected_log_prob", "likelihood_accuracy", "answer_tokens"),
}


def flat(params: Params) -> np.ndarray:
    return np.concatenate([params[name].ravel() for name in sorted(params)])


def tensors(path: Path, server_round: int) -> dict[str, Params]:
    return load_params(path / f"checkpoints/round-{server_round:05d}.safetensors")[0]


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOWLY else name
        for name in (*ALGORITHMS, "local", "centralized")
    ],
)
def test_every_algorithm_aligns(algorithm: str, whole_run: WholeRun) -> None:
    path = whole_run(*DPO, f"algorithm={algorithm}", *OPTIONS.get(algorithm, ()))
    start, *rounds = records(path)
    assert [record["round"] for record in rounds] == [1, 2]
    final = rounds[-1]["eval"]
    assert start["eval"].keys() == final.keys() == SCORES
    assert (start["eval"]["accuracy"], start["eval"]["margin"]) == (0.5, 0.0)
    assert final["margin"] > 0
    assert final["accuracy"] > 0.5
    assert final["loss"] < start["eval"]["loss"]
    for record in rounds:
        assert not record["failures"]
        for client in record["clients"].values():
            assert {"loss", "accuracy", "margin"} <= client.keys()
            assert client["num_examples"] == 16
    answers = (path / "answers.md").read_text()
    assert answers.count("## Prompt") == answers.count("**with the adapter") == 2
    summary = json.loads((path / "summary.json").read_text())
    assert summary["final"]["margin"] == pytest.approx(final["margin"])
    if algorithm == "scaffold":
        _check_control(path)
    if algorithm in ("fedavgm", "fedadagrad", "fedyogi", "fedadam"):
        moments = tensors(path, 2)
        names = {name for name in moments if name in ("state.m", "state.v")}
        assert names
        assert all(np.abs(flat(moments[name])).max() > 0 for name in names)


def _check_control(path: Path) -> None:
    """c is the mean of all clients' c_i, of gradients of the preference loss."""
    control = tensors(path, 2)["state.control"]
    own = np.zeros_like(flat(control))
    for folder in (path / "clients").iterdir():
        own += flat(load_params(max(folder.glob("round-*")))[0]["control"])
    np.testing.assert_allclose(flat(control), own / NUM_CLIENTS, atol=1e-6)
    assert np.abs(flat(control)).max() > 0


def test_local_answers_are_those_of_the_best_client(whole_run: WholeRun) -> None:
    """Nothing is aggregated there: the adapter of the server is the untrained one."""
    path = whole_run(*DPO, "algorithm=local")
    each = records(path)[-1]["local"]
    best = min(each, key=lambda name: each[name]["loss"])
    sections = (path / "answers.md").read_text().split("## Prompt\n\n")[1:]
    assert len(sections) == 2
    config = compose(tiny(*DPO))
    model = load_model(config)
    model.load(load_file(path / "adapters" / best / "adapter_model.safetensors"))
    data = simulated_data(config, task_of(config).records, model.tokenizer)
    asked = encode_prompts(
        data.source.eval["messages"][:2], model.tokenizer, config.data.template, 248
    )
    answers = [as_text(model, answer) for answer in generate(model, asked, Decoding(8))]
    for answer, section in zip(answers, sections, strict=True):
        assert f"**with the adapter of {best}, the best client**\n\n> {answer}" in section


@pytest.mark.slow
def test_proximal_term_acts(whole_run: WholeRun) -> None:
    plain = flat(load_file(whole_run(*DPO, "algorithm=fedavg") / ADAPTER))
    proximal = flat(load_file(whole_run(*DPO, "algorithm=fedprox", *OPTIONS["fedprox"]) / ADAPTER))
    start = flat(load_model(compose(tiny(*DPO))).initial)
    assert np.linalg.norm(proximal - start) < 0.5 * np.linalg.norm(plain - start)


@pytest.mark.parametrize(
    "algorithm",
    [
        name if name == "scaffold" else pytest.param(name, marks=pytest.mark.slow)
        for name in ALGORITHMS
    ],
)
def test_interrupted_run_ends_as_the_uninterrupted_one(
    algorithm: str, whole_run: WholeRun, tmp_path: Path
) -> None:
    """Kept reference values included: one client of round 2 has stored its own already."""
    chosen = (*DPO, f"algorithm={algorithm}", *OPTIONS.get(algorithm, ()))
    whole = whole_run(*chosen)
    with pytest.raises(RunInterrupted):
        run_intercepted(tmp_path / "stopped", interrupting(2, after=1), *chosen)
    assert newest_round(tmp_path / "stopped" / "checkpoints") == 1
    expected, found = outcome(whole), outcome(resume(tmp_path / "stopped"))
    assert sorted(found) == sorted(expected)
    assert found == expected
    assert (tmp_path / "stopped/answers.md").read_text() == (whole / "answers.md").read_text()


@torch.no_grad()
def one_by_one(module: Any, pairs: Any, chosen: list[int]) -> np.ndarray:
    """log p of both answers of some pairs, each row alone, by a plain model."""
    values = []
    for i in chosen:
        for tokens, supervised in pairs[i]:
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            scores = module(input_ids=ids).logits[0].double().log_softmax(-1)
            places = [t for t in range(1, len(tokens)) if supervised[t]]
            values.append(sum(float(scores[t - 1, tokens[t]]) for t in places))
    return np.array(values).reshape(-1, 2)


@pytest.mark.slow
def test_the_reference_on_disk_is_the_base_model(tmp_path: Path) -> None:
    """After three rounds of one adapter, with the model loaded by transformers alone."""
    overrides = (
        *DPO,
        "federation.num_rounds=3",
        "federation.sample_clients=3",
        "data.max_samples=90",
    )
    path = run_tiny(tmp_path / "run", *overrides, "evaluation.every=0").path
    config = compose(tiny(*overrides))
    source = model_source(config.model)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for index in range(NUM_CLIENTS):
        client = simulated_client(
            config, task_of(config).records, load_tokenizer(config.model), index
        )
        newest = max((path / "clients" / client.name).glob("round-*"))
        kept = load_params(newest)[0]["reference"]
        known = np.flatnonzero(kept["known"]).tolist()
        assert known == list(range(len(client.train)))
        some = known[::6]
        expected = one_by_one(base, client.train, some)
        np.testing.assert_allclose(kept["values"][some], expected, atol=1e-3, rtol=1e-5)


@pytest.fixture(scope="module")
def instructed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of an instruction tuning on the chosen answers."""
    place = tmp_path_factory.mktemp("instructed")
    pairs = Path(model_source(compose(tiny()).model)).parent / "demo/preferences_train.jsonl"
    lines = [json.loads(line) for line in pairs.read_text().splitlines()[:200]]
    notes = [{"instruction": line["prompt"], "output": line["chosen"]} for line in lines]
    (place / "chosen.jsonl").write_text("\n".join(json.dumps(note) for note in notes))
    data = ("data=jsonl", f"data.path={place}/chosen.jsonl", "training=tiny")
    run_tiny(place / "run", *data, "training.max_steps=4")
    return place / "run/adapter"


def test_alignment_after_instruction_tuning(instructed: Path, tmp_path: Path) -> None:
    """The usual path: the tuned model is where DPO starts, and what it is compared with."""
    path = run_tiny(
        tmp_path / "run",
        *DPO,
        f"init_adapter={instructed}",
        f"dpo.reference_adapter={instructed}",
        "communication.dtype=float32",
    ).path
    start, first, final = records(path)
    assert (start["eval"]["accuracy"], start["eval"]["margin"]) == (0.5, 0.0)
    assert final["eval"]["margin"] > 0
    exported = load_file(instructed / "adapter_model.safetensors")
    for server_round in (0, 1, 2):
        kept = tensors(path, server_round)["sent.reference"]
        np.testing.assert_array_equal(flat(kept), flat(exported))
    np.testing.assert_array_equal(flat(tensors(path, 0)["params"]), flat(exported))
    # The adapter travels down twice, once as the reference.
    size = sum(value.nbytes for value in exported.values())
    assert (first["bytes_down"], first["bytes_up"]) == (2 * 2 * size, 2 * size)


def test_the_base_stays_the_reference_of_a_tuned_start(instructed: Path, tmp_path: Path) -> None:
    path = run_tiny(
        tmp_path / "run", *DPO, f"init_adapter={instructed}", "federation.num_rounds=1"
    ).path
    start = records(path)[0]["eval"]
    assert start["margin"] != 0.0
    assert start["chosen_reward"] > 0.05  # tuned on such answers


@pytest.mark.slow
def test_clients_evaluate_on_their_own_pairs(whole_run: WholeRun) -> None:
    path = whole_run(
        *DPO, "evaluation.clients=true", "data.validation_fraction=0.2", "federation.num_rounds=1"
    )
    (record,) = records(path)[1:]
    scores = record["client_eval"]["clients"]
    assert sorted(scores) == ["client-0", "client-1", "client-2"]  # also those not sampled
    for score in scores.values():
        assert set(score) >= SCORES - {"answer_tokens"}
    losses = [score["loss"] for score in scores.values()]
    assert min(losses) <= record["client_eval"]["loss"] <= max(losses)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_base(quantization: str, whole_run: WholeRun) -> None:
    start, _, final = records(whole_run(*DPO, f"quantization={quantization}"))
    assert (start["eval"]["accuracy"], start["eval"]["margin"]) == (0.5, 0.0)
    assert final["eval"]["margin"] > 0
    assert final["eval"]["accuracy"] > 0.5
