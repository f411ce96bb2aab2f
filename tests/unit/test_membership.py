"""Measures of membership inference on scores whose answer is known, and the command on a run."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedllm_flwr.commands import main as cli
from fedllm_flwr.evaluation.membership import area_under_curve, found_at_few_errors, judge


def test_area_under_the_curve_is_the_share_of_pairs() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 9, 40) / 1.0, rng.integers(0, 9, 30) / 1.0
    pairs = np.subtract.outer(members, others)
    expected = np.mean((pairs > 0) + 0.5 * (pairs == 0))
    assert area_under_curve(members, others) == pytest.approx(expected)
    assert area_under_curve(members + 100, others) == 1.0


def test_members_found_at_one_error_in_a_hundred() -> None:
    others = np.arange(200.0)  # two of them may be taken for members
    members = np.array([0.0, 197.0, 197.5, 199.0, 500.0])
    assert found_at_few_errors(members, others) == pytest.approx(3 / 5)


def test_intervals_hold_the_truth_and_tell_leaks_from_none() -> None:
    rng = np.random.default_rng(3)
    none, leak = rng.normal(size=400), rng.normal(size=400) + 1
    others = {"none": rng.normal(size=400), "leak": rng.normal(size=400)}
    found = judge({"none": none, "leak": leak}, others, seed=0)
    assert found["none"].auc.low < 0.5 < found["none"].auc.high
    assert found["leak"].auc.low > 0.5
    assert found["leak"].auc.low < 0.7602 < found["leak"].auc.high  # Phi(1 / sqrt 2)


@pytest.mark.slow
def test_an_overfitted_run_leaks_and_a_private_one_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny_runs import run_tiny

    overfit = (
        *("federation.sample_clients=3", "federation.num_rounds=4", "data.max_samples=120"),
        *("training.max_steps=25", "training.batch_size=16", "training.learning_rate=1e-2"),
        *("evaluation.every=0", "lora.dropout=0", "privacy.canaries=100", "privacy.delta=1e-5"),
    )
    found = []
    for name, privacy in (("plain", ()), ("private", ("unit=record", "target_epsilon=2"))):
        run = run_tiny(tmp_path / name, *overfit, *(f"privacy.{key}" for key in privacy))
        assert cli.main(["audit", str(run.path)]) == 0
        found.append((capsys.readouterr().out, json.loads((run.path / "audit.json").read_text())))
    (said, plain), (said_of_private, private) = found
    assert "above guessing: loss, min-k" in said
    # The noise differs in every run, so these bounds lie four deviations from guessing.
    assert "AUC" in said_of_private
    assert all(private["attacks"][name]["auc"]["low"] < 0.56 for name in ("loss", "min-k"))
    assert private["canaries"]["auc"]["low"] < 0.65
    assert private["canaries"]["exposure"]["low"] < 2.2 < plain["canaries"]["exposure"]["low"]
    for audited in (plain, private):  # a random split: the base model tells nothing
        assert audited["attacks"]["base"]["auc"]["low"] < 0.5
        assert audited["attacks"]["base"]["auc"]["high"] > 0.5
    assert plain["canaries"]["exposure"]["low"] > 6
    assert plain["canaries"]["epsilon_above"] > 2
    assert private["canaries"]["epsilon_above"] < private["spent"]["epsilon"] <= 2
    one, noisy = plain["updates"]["one"], private["updates"]["one"]
    assert one["own"]["low"] > 0.7 > 0.3 > one["control"]["high"]
    assert noisy["own"]["high"] < 0.1
    assert "1 record" in said


def test_what_cannot_be_attacked_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", str(tmp_path)]) != 0
    assert cli.main(["audit", str(tmp_path), "--records", "0"]) != 0
    assert "--records must be > 0, got 0" in capsys.readouterr().err
