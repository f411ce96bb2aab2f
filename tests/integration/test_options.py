"""Options that change a run as a whole: evaluation, wire, quantization, start, sweeps."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fedllm_flwr.commands import main as cli
from fedllm_flwr.config import Config
from fedllm_flwr.federation.tensor_files import load_params
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.server.run import run_simulation
from tiny_runs import ADAPTER, outcome, records, run_tiny, tiny

WholeRun = Callable[..., Path]


def test_clients_evaluate_on_their_own_records(whole_run: WholeRun) -> None:
    path = whole_run("evaluation.clients=true", "data.validation_fraction=0.2")
    for record in records(path)[1:]:
        scores = record["client_eval"]["clients"]
        assert sorted(scores) == ["client-0", "client-1", "client-2"]  # also those not sampled
        losses = [score["loss"] for score in scores.values()]
        assert min(losses) <= record["client_eval"]["loss"] <= max(losses)


@pytest.mark.parametrize("kind", ["leave_one_out", "alone"])
def test_contribution_of_each_client(kind: str, whole_run: WholeRun) -> None:
    path = whole_run(f"evaluation.contribution={kind}", "evaluation.every=1")
    assert records(path)[2]["eval"] == records(whole_run("evaluation.every=1"))[2]["eval"]
    for record in records(path)[1:]:
        values = record["leave_one_out" if kind == "leave_one_out" else "update_alone"]
        assert values.keys() == record["clients"].keys()
        losses = [
            value if kind == "alone" else record["eval"]["loss"] + value
            for value in values.values()
        ]
        assert all(0 < loss < 20 and loss != record["eval"]["loss"] for loss in losses)
    assert "rounds scored" in (path / "report.html").read_text()


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_wire_dtypes(dtype: str, width: int, whole_run: WholeRun) -> None:
    path = whole_run(f"communication.dtype={dtype}")
    tensors = load_file(path / "adapter/adapter_model.safetensors")
    count = sum(value.size for value in tensors.values())
    assert records(path)[1]["bytes_up"] == 2 * width * count
    exact = records(whole_run("communication.dtype=float32"))[2]["eval"]["loss"]
    assert records(path)[2]["eval"]["loss"] == pytest.approx(exact, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_base(quantization: str, whole_run: WholeRun) -> None:
    log = records(whole_run(f"quantization={quantization}"))
    plain = records(whole_run("quantization=none"))
    assert log[0]["eval"]["loss"] == pytest.approx(plain[0]["eval"]["loss"], rel=0.15)
    assert log[0]["eval"]["loss"] != plain[0]["eval"]["loss"]
    assert log[2]["eval"]["loss"] < log[0]["eval"]["loss"]


def test_training_starts_from_an_adapter(whole_run: WholeRun, tmp_path: Path) -> None:
    first = whole_run("algorithm=fedavg")
    second = run_tiny(tmp_path / "run", f"init_adapter={first}/adapter", "checkpoint.keep=3")
    exported = load_file(first / "adapter/adapter_model.safetensors")
    start = load_params(second.checkpoints / "round-00000.safetensors")[0]["params"]
    assert {name: value.tobytes() for name, value in start.items()} == {
        name: value.tobytes() for name, value in exported.items()
    }
    assert records(second)[0]["eval"] == records(first)[2]["eval"]


@pytest.mark.parametrize(
    "partition",
    [
        "natural",
        "dirichlet",
        pytest.param("pathological", marks=pytest.mark.slow),
        pytest.param("size", marks=pytest.mark.slow),
    ],
)
def test_partitions(partition: str, whole_run: WholeRun) -> None:
    column = {
        "natural": ["partition.column=desk", "federation.num_clients=null"],
        "dirichlet": ["partition.column=output", "partition.alpha=0.5"],
        "pathological": ["partition.column=output"],
    }
    path = whole_run(f"partition={partition}", *column.get(partition, []))
    with (path / "clients.csv").open() as file:
        rows = list(csv.DictReader(file))
    sizes = [int(row["examples"]) for row in rows]
    assert sum(sizes) == 100
    assert len(rows) == (10 if partition == "natural" else 3)
    if partition == "size":
        assert sizes == sorted(sizes)
        assert len(set(sizes)) == 3
    if partition == "pathological":
        labels = [name for name in rows[0] if name.startswith("label:")]
        assert all(sum(row[name] != "0" for name in labels) == 2 for row in rows)


@pytest.mark.slow
def test_multirun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = tiny("federation.engine=inprocess", "algorithm=fedavg,scaffold", "seed=1,2")
    assert cli.main(["run", "--quiet", "--multirun", *sweep]) == 0
    (results,) = tmp_path.glob("multirun/*/results.csv")
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [
        "algorithm=fedavg,seed=1",
        "algorithm=fedavg,seed=2",
        "algorithm=scaffold,seed=1",
        "algorithm=scaffold,seed=2",
    ]
    runs = sorted(path.parent for path in results.parent.glob("*/summary.json"))
    for row, run in zip(rows, runs, strict=True):
        final = json.loads((run / "summary.json").read_text())["final"]
        assert float(row["loss"]) == pytest.approx(final["loss"], abs=1e-4)
    assert [(row["algorithm"], row["seed"]) for row in rows] == [
        (algorithm, seed) for algorithm in ("fedavg", "scaffold") for seed in "12"
    ]
    assert outcome(runs[0])[ADAPTER] != outcome(runs[1])[ADAPTER]
    assert capsys.readouterr().err == ""


def test_multirun_goes_on_after_a_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    diverging = ["training.max_grad_norm=0", "communication.dtype=float32"]
    sweep = tiny("federation.engine=inprocess", "federation.num_rounds=1", *diverging)
    sweep += ["training.learning_rate=1e15,0.005", "output_dir=rates"]
    assert cli.main(["run", "--quiet", "--multirun", *sweep]) == 1
    with Path("rates/results.csv").open() as file:
        failed, good = csv.DictReader(file)
    assert "lower training.learning_rate than 1e+15" in failed["error"]
    assert failed["loss"] == ""
    assert float(good["loss"]) > 0
    assert "lower training.learning_rate than 1e+15" in capsys.readouterr().err


def test_a_stopped_sweep_keeps_its_rows_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C lost the table, and nothing could be gone on with."""
    monkeypatch.chdir(tmp_path)
    sweep = tiny("federation.engine=inprocess", "task=dpo", "federation.num_rounds=1")
    sweep += ["seed=1,2", "output_dir=seeds"]
    calls: list[str] = []

    def interrupted(config: Config, *rest: Any) -> RunDirectory:
        calls.append(str(config.output_dir))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_simulation(config, *rest)

    monkeypatch.setattr("fedllm_flwr.commands.sweep.run_simulation", interrupted)
    assert cli.main(["run", "--quiet", "--multirun", *sweep]) == 130
    how = "fedllm run --multirun resume=seeds"
    assert f"interrupted; 1 of 2 runs are done, resume with: {how}" in capsys.readouterr().err
    [row] = _rows("seeds")
    assert (row["run"], row["seed"]) == ("seed=1", "1")
    final = json.loads(Path("seeds/0-seed=1/summary.json").read_text())["final"]
    assert float(row["margin"]) == pytest.approx(final["margin"], abs=1e-4)

    assert cli.main(["status", "seeds"]) == 3
    shown = capsys.readouterr().out
    assert shown.startswith("seeds: sweep, 1 of 2 runs finished, 1 waiting\n")
    assert f"resume with: {how}" in shown
    assert cli.main(["run", "--quiet", "--multirun", "resume=seeds", "seed=4,5"]) == 2
    assert "seed=4,5: a sweep is resumed with its own overrides" in capsys.readouterr().err

    assert cli.main(["run", "--quiet", "--multirun", "resume=seeds"]) == 0
    assert [Path(call).name for call in calls[2:]] == ["1-seed=2"]
    assert [row["seed"] for row in _rows("seeds")] == ["1", "2"]
    capsys.readouterr()
    assert cli.main(["status", "seeds", "--watch", "0.1"]) == 0  # it ends with the sweep
    assert capsys.readouterr().out.startswith("seeds: sweep, 2 of 2 runs finished\n")
    assert cli.main(["run", "--multirun", *sweep]) == 2
    assert "output_dir=seeds holds a sweep already" in capsys.readouterr().err


def _rows(sweep: str) -> list[dict[str, str]]:
    with Path(sweep, "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_multirun_is_refused_as_a_whole_where_one_run_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = tiny("federation.engine=inprocess", "data.max_samples=100,2", "output_dir=sizes")
    assert cli.main(["run", "--quiet", "--multirun", *sweep]) == 2
    assert "more than the 2 training records" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1,2", "output_dir=taken"], "output_dir=taken is not empty; give another"),
        (["output_dir=a,b"], "output_dir has several values"),
    ],
)
def test_multirun_needs_one_directory_of_its_own(
    overrides: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    assert cli.main(["run", "--quiet", "--multirun", *tiny(*overrides)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
