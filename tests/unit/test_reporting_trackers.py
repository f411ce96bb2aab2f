"""Trackers: the real TensorBoard read back; the others by what they must not break."""

import importlib.util
import json
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imsave

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import TrackingConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.reporting.trackers import (
    Trackers,
    attach_files,
    check_trackers,
    open_trackers,
    scalars,
)

RECORDS: list[dict[str, Any]] = [
    {"round": 0, "seconds": 0.0, "eval": {"loss": 2.5, "accuracy": None}},
    {
        "round": 3,
        "loss": 1.5,
        "learning_rate": 0.005,
        "clients": {"st-mary's/A": {"loss": 1.25, "steps": 10}},
        "failures": {"b": "x", "c": "y"},
        "seconds": 3.0,
        "bytes_up": 7,
        "bytes_down": 9,
        "client_eval": {
            "loss": 1.75,
            "clients": {"st-mary's/A": {"loss": 1.75}, "b": {"loss": 2.25}},
        },
        "update_norm": {"st-mary's/A": 0.5},
        "epsilon": 2.5,
    },
]


def test_scalars_are_flat_and_missing_ones_left_out() -> None:
    assert scalars(RECORDS[0]) == {"eval/loss": 2.5, "system/round_seconds": 0.0}
    assert scalars(RECORDS[1]) == {
        "train/loss": 1.5,
        "train/learning_rate": 0.005,
        "train/failures": 2.0,
        "system/round_seconds": 3.0,
        "system/bytes_up": 7.0,
        "system/bytes_down": 9.0,
        "client_eval/loss": 1.75,
        "client/st-mary_s_A/loss": 1.25,
        "client/st-mary_s_A/steps": 10.0,
        "client/st-mary_s_A/update_norm": 0.5,
        "client/st-mary_s_A/eval/loss": 1.75,
        "client/b/eval/loss": 2.25,
        "drift/update_norm_mean": 0.5,
        "drift/update_norm_lowest": 0.5,
        "fairness/loss_mean": 2.0,
        "fairness/loss_best": 1.75,
        "fairness/loss_worst": 2.25,
        "fairness/loss_range": 0.5,
        "fairness/loss_deviation": 0.25,
        "privacy/epsilon": 2.5,
    }


def sent() -> list[tuple[int, dict[str, float]]]:
    """What a tracker gets of each round: its scalars, and the costs so far."""
    spent = ({"megabytes": 0.0, "seconds": 0.0}, {"megabytes": 16e-6, "seconds": 3.0})
    return [
        (record["round"], scalars(record) | {f"system/total_{k}": v for k, v in total.items()})
        for record, total in zip(RECORDS, spent, strict=True)
    ]


def test_tensorboard_holds_every_scalar(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Config(tracking=TrackingConfig(tensorboard=True))
    tracker = open_trackers(config, tmp_path)
    for count in (1, 2):
        tracker.log(RECORDS[:count])
    tracker.close()
    figure = tmp_path / "curves.png"
    imsave(figure, np.zeros((2, 3, 3)))
    assert attach_files(config, tmp_path, [figure, tmp_path / "no.html"]) == ""

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    stored = {
        (name, event.step): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    assert stored == pytest.approx(
        {(name, number): value for number, values in sent() for name, value in values.items()}
    )
    assert events.Tags()["images"] == ["figures/curves"]
    [text] = events.Tensors("config/text_summary")
    assert b'"learning_rate": 0.0002' in text.tensor_proto.string_val[0]


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    tracker = open_trackers(Config(), tmp_path)
    tracker.log(RECORDS[:1])
    tracker.close()

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_library_is_named_with_its_remedy(name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(
        ConfigError,
        match=rf"tracking\.{name}=true, but {name} is not installed; "
        r"pip install 'fedllm-flwr\[track",
    ):
        check_trackers(TrackingConfig(**{name: True}))


def test_a_tracker_that_cannot_start_is_a_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the directory should be")

    with pytest.raises(ConfigError, match=r"tracking\.tensorboard=true: cannot start \(") as caught:
        open_trackers(Config(tracking=TrackingConfig(tensorboard=True)), tmp_path)
    assert "\n" not in str(caught.value)


class Recorder:
    """Keeps what it is sent, and fails from a given round on."""

    def __init__(self, fails_from: int = 99) -> None:
        self.rounds: list[int] = []
        self.ended: list[bool] = []
        self._fails_from = fails_from

    def log(self, round: int, values: Mapping[str, float]) -> None:
        if round >= self._fails_from:
            raise ConnectionError("server gone\nand more")
        self.rounds.append(round)

    def add_files(self, files: Sequence[Path]) -> None:
        pass

    def close(self, succeeded: bool = True) -> None:
        self.ended.append(succeeded)


def test_a_tracker_that_fails_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = Recorder(fails_from=1), Recorder()
    both = Trackers({"wandb": broken, "mlflow": sound})
    with caplog.at_level(logging.WARNING):
        for i in range(3):
            both.log([{"round": i}])
        both.close(succeeded=False)

    assert (broken.rounds, sound.rounds) == ([0], [0, 1, 2])
    assert sound.ended == [False]
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("tracking.wandb: server gone;")


def one_round_each(tmp_path: Path, name: str) -> None:
    """Two sessions of one run, as after a crash, and a figure at its end."""
    config = Config(tracking=TrackingConfig(**{name: True}, group="sweep", tags=["mine"]))
    for count in (1, 2):
        tracker = open_trackers(config, tmp_path)
        tracker.log(RECORDS[:count])
        tracker.close()
    figure = tmp_path / "curves.png"
    imsave(figure, np.zeros((2, 3, 3)))
    assert attach_files(config, tmp_path, [figure]) == ""


@pytest.mark.slow
def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    one_round_each(tmp_path, "mlflow")

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("fedllm-flwr")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics == pytest.approx(sent()[0][1] | sent()[1][1])
    assert run.data.params["training.learning_rate"] == "0.0002"
    assert {"group": "sweep", "mine": "true", "fedavg": "true"}.items() <= run.data.tags.items()
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["curves.png"]


@pytest.mark.slow
def test_trackio_goes_on_in_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    script = "import sys, pathlib, test_reporting_trackers as t; t.one_round_each(*t.arguments())"
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "run"), "trackio"]
    (tmp_path / "run").mkdir()
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parent, timeout=300)

    [database] = (tmp_path / "store").glob("fedllm-flwr*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step")
        found = [(name, step, json.loads(metrics)) for name, step, metrics in rows]
    assert len({name for name, *_ in found}) == 1
    assert [(step, pytest.approx(metrics)) for _, step, metrics in found] == sent()


def arguments() -> tuple[Path, str]:
    """Those of a process that this file starts."""
    return Path(sys.argv[1]), sys.argv[2]


@pytest.mark.slow
def test_wandb_offline_goes_on_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    one_round_each(tmp_path, "wandb")

    files = [file.name for file in tmp_path.rglob("*.wandb")]
    assert len(files) == 3
    assert len(set(files)) == 1
