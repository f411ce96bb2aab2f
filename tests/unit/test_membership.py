"""Measures of membership inference on scores whose answer is known, and the command on a run."""

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
        *("data.eval_max_samples=300", "evaluation.every=0", "lora.dropout=0"),
    )
    said = []
    for name, privacy in (("plain", ()), ("private", ("unit=record", "target_epsilon=2"))):
        run = run_tiny(tmp_path / name, *overfit, *(f"privacy.{key}" for key in privacy))
        assert cli.main(["audit", str(run.path)]) == 0
        said.append(capsys.readouterr().out.splitlines()[-1])
        assert (run.path / "audit.json").is_file()
    assert said[0].startswith("above guessing: loss, min-k")
    assert said[1] == "no attack is above guessing"


def test_what_cannot_be_attacked_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", str(tmp_path)]) != 0
    assert cli.main(["audit", str(tmp_path), "--records", "0"]) != 0
    assert "--records must be > 0, got 0" in capsys.readouterr().err
