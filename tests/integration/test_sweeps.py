"""Sweeps side by side, through Hydra's launcher, and searches: what one by one makes."""

import csv
from pathlib import Path

import pytest

from fedllm_flwr.commands import main as cli
from tiny_runs import ADAPTER, tiny

pytestmark = pytest.mark.slow

SMALL = tiny("federation.engine=inprocess", "federation.num_rounds=1", "tracking.figures=true")


@pytest.mark.parametrize(
    "how", [["--jobs", "2"], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]]
)
def test_runs_side_by_side_are_those_of_one_by_one(
    how: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "hydra/launcher=joblib" in how:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = ["run", "--quiet", "--multirun", *SMALL, "seed=1,2"]
    assert cli.main([*sweep, f"output_dir={tmp_path}/one"]) == 0
    assert cli.main([*sweep, f"output_dir={tmp_path}/two", *how]) == 0
    for name in ("0-seed=1", "1-seed=2"):
        one, two = (tmp_path / folder / name / ADAPTER for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    tables = [(tmp_path / folder / "results.csv").read_text() for folder in ("one", "two")]
    assert tables[0] == tables[1]
    assert (tmp_path / "two" / "results.png").is_file()
    assert capsys.readouterr().out.count("best by validation loss: seed=") == 2


def test_a_run_that_fails_in_a_launcher_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = [*SMALL, "training.learning_rate=1e15,0.005", f"output_dir={tmp_path}/rates"]
    assert cli.main(["run", "--multirun", *sweep, "hydra/launcher=joblib"]) == 1
    captured = capsys.readouterr()
    assert "finite numbers" in captured.err
    assert "best by validation loss: training.learning_rate=0.005" in captured.out


def test_every_algorithm_is_searched_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    names = ("fedavg", "fedadam")
    arguments = [f"algorithm={','.join(names)}", f"output_dir={tmp_path}/found", "--trials", "2"]
    settings = [text for text in SMALL if not text.startswith("algorithm")]
    assert cli.main(["tune", *settings, "data.validation_fraction=0.2", *arguments]) == 0
    rows = trials(tmp_path)
    rates = {
        name: [float(row["training.learning_rate"]) for row in rows if row["algorithm"] == name]
        for name in names
    }
    assert rates["fedavg"] == rates["fedadam"]  # the first proposals depend on the seed alone
    assert all(1e-4 <= rate <= 2e-2 for rate in rates["fedavg"])
    assert all(float(row["validation_loss"]) > 0 for row in rows)

    capsys.readouterr()
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("summary.json")}
    assert cli.main(["tune", f"resume={tmp_path}/found"]) == 0
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("summary.json")} == times
    assert trials(tmp_path) == rows
    assert (tmp_path / "found" / "tune.png").is_file()


def trials(folder: Path) -> list[dict[str, str]]:
    with (folder / "found" / "tune.csv").open() as file:
        return list(csv.DictReader(file))
