"""The metrics log and the summary: what is written is read back, whatever happened between."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from fedllm_flwr.errors import DataError, FederationError
from fedllm_flwr.reporting.metrics import MetricsLog, read_metrics, summarise, write_summary


def fill(path: Path, rounds: int) -> list[dict[str, object]]:
    records = [{"round": i, "loss": 1.0 / (i + 1)} for i in range(rounds)]
    log = MetricsLog(path)
    for record in records:
        log.append(record)
    return records


def test_records_come_back_as_they_went(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    records = fill(path, 3)

    assert read_metrics(path) == records
    assert [json.loads(line) for line in path.read_text().splitlines()] == records


def test_nan_and_infinity_become_null_at_any_depth(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append(
        {
            "round": 1,
            "loss": float("nan"),
            "clients": {"a": {"loss": float("inf"), "steps": np.int64(3)}},
            "values": [np.float32(0.5), -float("inf")],
        }
    )

    text = log.path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_metrics(log.path) == [
        {
            "round": 1,
            "loss": None,
            "clients": {"a": {"loss": None, "steps": 3}},
            "values": [0.5, None],
        }
    ]


def test_a_line_cut_short_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.jsonl"
    records = fill(path, 3)
    path.write_bytes(path.read_bytes()[:-9])

    with caplog.at_level(logging.WARNING):
        assert read_metrics(path) == records[:2]
    assert "line 3: cut short" in caplog.text


def test_damage_before_the_last_line_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    fill(path, 3)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", lines[2]]))

    with pytest.raises(DataError, match=r"m\.jsonl, line 2: not a record"):
        read_metrics(path)


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl: No such file"):
        read_metrics(tmp_path / "none.jsonl")


@pytest.mark.parametrize("cut", [0, 5])
def test_resuming_drops_rounds_after_the_checkpoint(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.jsonl"
    records = fill(path, 5)
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) - cut])

    log = MetricsLog(path, resume_from_round=2)
    log.append({"round": 3, "loss": 9.0})

    assert read_metrics(path) == [*records[:3], {"round": 3, "loss": 9.0}]
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_new_log_starts_empty(tmp_path: Path) -> None:
    fill(tmp_path / "m.jsonl", 3)

    MetricsLog(tmp_path / "m.jsonl")
    assert read_metrics(tmp_path / "m.jsonl") == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(FederationError, match="cannot write"):
        MetricsLog(tmp_path / "file" / "m.jsonl")


def test_summary_adds_up() -> None:
    records = [
        {"round": 0, "seconds": 0.0, "eval": {"loss": 2.5, "accuracy": 0.3}},
        {"round": 1, "bytes_up": 10, "bytes_down": 20, "failures": {"a": "x", "b": "y"}},
        {"round": 2, "bytes_up": 30, "bytes_down": 40, "failures": {}, "eval": {"loss": 0.5}},
        {"round": 3, "bytes_up": 1, "bytes_down": 2, "eval": {"loss": 0.7, "accuracy": 0.8}},
        {"round": 4, "bytes_up": 1, "bytes_down": 2, "eval": {"loss": None}},
    ]

    assert summarise(records, {"training": 3.0, "start-up": 4.0}, seconds=10.0) == {
        "base": {"loss": 2.5, "accuracy": 0.3},
        "final": {"loss": None},
        "best": {"round": 2, "loss": 0.5},
        "rounds": 4,
        "seconds": 10.0,
        "phases": {"training": 3.0, "start-up": 4.0, "rest": 3.0},
        "bytes_up": 42,
        "bytes_down": 64,
        "failures": 2,
    }
    assert summarise(records, {"training": 3.0, "start-up": 4.0})["seconds"] == 7.0


def test_a_run_without_evaluation_has_no_metrics_to_compare() -> None:
    summary = summarise([{"round": 1}], {})

    assert (summary["base"], summary["final"], summary["best"]) == (None, None, None)


def test_summary_file_is_plain_json(tmp_path: Path) -> None:
    write_summary(tmp_path / "summary.json", {"final": {"loss": float("nan")}, "rounds": 2})

    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text) == {"final": {"loss": None}, "rounds": 2}
    assert "NaN" not in text
