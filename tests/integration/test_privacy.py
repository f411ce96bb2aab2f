"""Every algorithm with every task under both units of privacy, two rounds on the demo."""

from pathlib import Path

import pytest

from tiny_runs import ALGORITHMS, records, run_tiny

TASKS = ("sft", "dpo", "kto")
FAMILY = ["ffa", "rolora", "lora_fair", "fedex", "flexlora", "hetlora", "flora", "fedsa", "ditto"]
FAST = {("scaffold", "dpo", "client"), ("fedyogi", "kto", "record")}
MATRIX = [
    pytest.param(*cell, marks=[] if cell in FAST else pytest.mark.slow)
    for cell in ((a, t, u) for a in ALGORITHMS for t in TASKS for u in ("client", "record"))
]


@pytest.mark.parametrize(("algorithm", "task", "unit"), MATRIX)
def test_a_run_keeps_to_its_target(algorithm: str, task: str, unit: str, tmp_path: Path) -> None:
    run = run_tiny(
        tmp_path / "run",
        *(f"algorithm={algorithm}", f"task={task}", f"privacy.unit={unit}"),
        *("privacy.target_epsilon=6", "privacy.delta=1e-3"),
    )
    first, second = records(run)[1:]
    assert 0 < first["epsilon"] <= second["epsilon"] <= 6
    assert second["epsilon"] > 5.9
    assert second["delta"] == 1e-3
    assert second["eval"]["loss"] == pytest.approx(second["eval"]["loss"])  # finite
    assert (run.known_clients / "releases.jsonl").read_text("utf-8").count("\n") == 2
    assert f"per {unit}: epsilon" in (run.adapter / "README.md").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["client", "record"])
@pytest.mark.parametrize(
    "option",
    [
        "quantization=nf4",
        "quantization=int8",
        "training.gradient_checkpointing=true",
        "training.gradient_accumulation_steps=2",
        "algorithm.mu=0.1",
        "communication.dtype=float16",
        "communication.downlink=int8",
        "dpo.loss_type=ipo task=dpo dpo.sft_weight=0.1",
    ],
)
def test_options_go_with_a_promise(option: str, unit: str, tmp_path: Path) -> None:
    noise = ("privacy.noise_multiplier=1", f"privacy.unit={unit}")
    run = run_tiny(tmp_path / "run", *noise, *option.split())
    assert records(run)[2]["epsilon"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "privacy.unit=record privacy.secure_aggregation=true federation.sample_clients=3",
        "privacy.unit=record privacy.secure_aggregation=true federation.sample_clients=3 "
        "algorithm=scaffold",
        "privacy.unit=record communication.transforms=[int8]",
        "privacy.unit=record communication.transforms=[int4] task=dpo",
        "privacy.unit=record communication.transforms=[top_k] task=kto",
        "privacy.unit=record algorithm.combiner=median federation.sample_clients=3",
        "privacy.unit=record algorithm.weighting=examples federation.min_replies=1",
        "privacy.unit=record algorithm=local",
        "privacy.unit=record algorithm=centralized federation.num_clients=1 "
        "federation.sample_clients=1",
        "privacy.unit=client algorithm=ffa",
        "privacy.unit=client algorithm=rolora",
        "privacy.unit=client algorithm=fedsa evaluation.clients=false",
        "privacy.unit=client algorithm=ditto evaluation.clients=false",
        "privacy.unit=client privacy.sampling=fixed federation.min_replies=1",
        "privacy.unit=client lora.dora=true communication.dtype=float32",
        "privacy.unit=client task=dpo dpo.loss_type=aot",
        # With an adapter of its own, a client scores it, unless it may not.
        *(f"privacy.unit=record algorithm={name} evaluation.clients=false" for name in FAMILY),
    ],
)
def test_neighbouring_options_go_with_a_promise(options: str, tmp_path: Path) -> None:
    run = run_tiny(tmp_path / "run", "privacy.target_epsilon=8", *options.split())
    assert 7 < records(run)[2]["epsilon"] <= 8


@pytest.mark.slow
def test_an_interrupted_run_ends_at_its_target(tmp_path: Path) -> None:
    from tiny_runs import resume

    promise = ("privacy.unit=client", "privacy.noise_multiplier=3", "privacy.target_epsilon=3")
    first = run_tiny(tmp_path / "run", *promise, "privacy.sampling=poisson", "privacy.delta=1e-2")
    done = resume(first.path, "federation.num_rounds=50")
    last = records(done)[-1]
    assert last["round"] < 50
    assert last["budget_spent"]
    assert 2 < last["epsilon"] <= 3
    assert "eval" in last
