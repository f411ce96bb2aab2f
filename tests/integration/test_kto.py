"""KTO on the tiny model from end to end, with every algorithm."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm_flwr.errors import RunInterrupted
from tiny_runs import (
    ALGORITHMS,
    interrupting,
    outcome,
    records,
    resume,
    run_intercepted,
    run_tiny,
)

WholeRun = Callable[..., Path]

KTO = (
    "task=kto",
    "evaluation.answers=2",
    "evaluation.max_new_tokens=8",
    "checkpoint.keep=3",
    "training.max_steps=6",
    "training.batch_size=8",
    "training.learning_rate=0.005",
    "data.max_samples=200",
    "data.eval_max_samples=30",
)
OPTIONS = {
    "fedprox": ("algorithm.mu=1",),
    "centralized": ("federation.num_clients=1", "federation.sample_clients=1"),
}
# The others are slow tests; with pairs, every kind of algorithm is a quick one.
SCORES = {"loss", "accuracy", "margin", "desirable_reward", "undesirable_reward", "kl"}


@pytest.mark.parametrize(
    "algorithm",
    [
        name if name == "scaffold" else pytest.param(name, marks=pytest.mark.slow)
        for name in (*ALGORITHMS, "local", "centralized")
    ],
)
def test_every_algorithm_aligns(algorithm: str, whole_run: WholeRun) -> None:
    path = whole_run(*KTO, f"algorithm={algorithm}", *OPTIONS.get(algorithm, ()))
    start, *rounds = records(path)
    assert [record["round"] for record in rounds] == [1, 2]
    final = rounds[-1]["eval"]
    assert start["eval"].keys() == final.keys() == SCORES | {"answer_tokens"}
    assert [start["eval"][name] for name in ("loss", "accuracy", "margin", "kl")] == [
        0.5,
        0.5,
        0,
        0,
    ]
    assert final["margin"] > 0
    assert final["loss"] < 0.5
    for record in rounds:
        assert not record["failures"]
        for client in record["clients"].values():
            assert {"loss", "accuracy", "margin", "kl"} <= client.keys()
            assert client["num_examples"] == 48
    assert (path / "answers.md").read_text().count("## Prompt") == 2


@pytest.mark.slow  # as with pairs, where it is quick
def test_interrupted_run_ends_as_the_uninterrupted_one(whole_run: WholeRun, tmp_path: Path) -> None:
    """Kept reference values included: one client of round 2 has stored its own already."""
    chosen = (*KTO, "algorithm=scaffold")
    with pytest.raises(RunInterrupted):
        run_intercepted(tmp_path / "stopped", interrupting(2, after=1), *chosen)
    assert outcome(resume(tmp_path / "stopped")) == outcome(whole_run(*chosen))


def test_own_answers_most_of_one_kind(tmp_path: Path) -> None:
    """Also a client whose answers are all undesirable takes part."""
    rows = [
        {"prompt": f"Is {i} even?", "answer": "No idea.", "label": False, "desk": f"d{i % 2}"}
        for i in range(30)
    ]
    rows += [
        {"prompt": f"Is {i} odd?", "answer": "Let me see.", "label": True, "desk": "d1"}
        for i in range(10)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = run_tiny(
        tmp_path / "run",
        "task=kto",
        "data=jsonl",
        f"data.path={tmp_path}/own.jsonl",
        "data.validation_fraction=0.2",
        "partition=natural",
        "partition.column=desk",
        "federation.num_clients=2",
        "federation.num_rounds=1",
        "training.max_steps=1",
        "evaluation.clients=true",
    ).path
    _, only = records(path)
    assert only["failures"] == {}
    clients = only["clients"]
    assert "margin" not in clients["d0"]
    assert "margin" in clients["d1"]


@pytest.mark.slow
def test_alignment_from_and_against_an_adapter(whole_run: WholeRun, tmp_path: Path) -> None:
    first = whole_run(*KTO, "algorithm=fedavg") / "adapter"
    path = run_tiny(
        tmp_path / "run", *KTO, f"init_adapter={first}", f"kto.reference_adapter={first}"
    ).path
    start, *_, final = records(path)
    # The start is sent in bfloat16 and scored as it is, the reference as it was sent.
    assert abs(start["eval"]["margin"]) < 0.05
    assert final["eval"]["margin"] > start["eval"]["margin"]
