"""Trackers: the real TensorBoard read back; the others by what they must not break."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import TrackingConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.reporting.trackers import Trackers, check_trackers, open_trackers, scalars

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
        "client_eval": {"loss": 1.75, "clients": {"st-mary's/A": {"loss": 1.75}}},
        "update_norm": {"st-mary's/A": 0.5},
        "epsilon": 2.5,
    },
]


def test_scalars_are_flat_and_missing_ones_left_out() -> None:
    assert scalars(RECORDS[0]) == {"eval/loss": 2.5, "time/round_seconds": 0.0}
    assert scalars(RECORDS[1]) == {
        "train/loss": 1.5,
        "train/learning_rate": 0.005,
        "train/failures": 2.0,
        "time/round_seconds": 3.0,
        "comm/bytes_up": 7.0,
        "comm/bytes_down": 9.0,
        "client_eval/loss": 1.75,
        "clients/st-mary_s_A/loss": 1.25,
        "clients/st-mary_s_A/steps": 10.0,
        "clients/st-mary_s_A/update_norm": 0.5,
        "clients/st-mary_s_A/eval/loss": 1.75,
        "privacy/epsilon": 2.5,
    }


def test_tensorboard_holds_every_scalar(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Config(tracking=TrackingConfig(tensorboard=True))
    tracker = open_trackers(config, tmp_path)
    for record in RECORDS:
        tracker.log(record)
    tracker.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    stored = {
        (name, event.step): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    assert stored == pytest.approx(
        {
            (name, record["round"]): value
            for record in RECORDS
            for name, value in scalars(record).items()
        }
    )
    [text] = events.Tensors("config/text_summary")
    assert b'"learning_rate": 0.0002' in text.tensor_proto.string_val[0]


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    tracker = open_trackers(Config(), tmp_path)
    tracker.log(RECORDS[0])
    tracker.close()

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_library_is_named_with_its_remedy(name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(
        ConfigError,
        match=rf"tracking\.{name}=true, but {name} is not installed; "
        r"pip install 'fedllm-flwr\[tracking\]'",
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

    def log(self, record: dict[str, Any]) -> None:
        if record["round"] >= self._fails_from:
            raise ConnectionError("server gone\nand more")
        self.rounds.append(record["round"])

    def close(self, succeeded: bool = True) -> None:
        self.ended.append(succeeded)


def test_a_tracker_that_fails_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = Recorder(fails_from=1), Recorder()
    both = Trackers({"wandb": broken, "mlflow": sound})
    with caplog.at_level(logging.WARNING):
        for i in range(3):
            both.log({"round": i})
        both.close(succeeded=False)

    assert (broken.rounds, sound.rounds) == ([0], [0, 1, 2])
    assert sound.ended == [False]
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("tracking.wandb: server gone;")


def one_round_each(tmp_path: Path, name: str) -> None:
    """Two sessions of one run, as after a crash."""
    config = Config(tracking=TrackingConfig(**{name: True}))
    for record in RECORDS:
        tracker = open_trackers(config, tmp_path)
        tracker.log(record)
        tracker.close()


@pytest.mark.slow
def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    one_round_each(tmp_path, "mlflow")

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("fedllm-flwr")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics == pytest.approx(scalars(RECORDS[0]) | scalars(RECORDS[1]))
    assert run.data.params["training.learning_rate"] == "0.0002"


@pytest.mark.slow
def test_wandb_offline_goes_on_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    one_round_each(tmp_path, "wandb")

    files = [file.name for file in tmp_path.rglob("*.wandb")]
    assert len(files) == 2
    assert len(set(files)) == 1
