"""A stopped run goes on and ends in the bits of one that was never stopped."""

import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.commands import main as cli
from fedllm_flwr.config.compose import compose
from fedllm_flwr.config.describe import keys
from fedllm_flwr.errors import ConfigError, DataError, FederationError, RunInterrupted
from fedllm_flwr.federation.state import load_state, newest_round
from fedllm_flwr.federation.tensor_files import load_params
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.runs.directory import _FREE_TO_CHANGE
from fedllm_flwr.server.run import run_simulation
from tiny_runs import (
    ADAPTER,
    ALGORITHMS,
    TINY,
    interrupting,
    outcome,
    records,
    resume,
    run_intercepted,
    run_tiny,
)

WholeRun = Callable[..., Path]
# One for each kind of state: none, control variates, moments. The others are slow together.
BY_DEFAULT = ("fedavg", "scaffold", "fedadam")
SOME_SLOWLY = [
    name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow)
    for name in ALGORITHMS
]


@pytest.mark.parametrize("algorithm", SOME_SLOWLY)
def test_interrupted_run_ends_as_the_uninterrupted_one(
    algorithm: str, whole_run: WholeRun, tmp_path: Path
) -> None:
    chosen = f"algorithm={algorithm}"
    whole = whole_run(chosen)
    with pytest.raises(RunInterrupted) as caught:
        # In the middle of round 2: one client has trained and stored its state, one has not.
        run_intercepted(tmp_path / "stopped", interrupting(2, after=1), chosen)
    assert str(caught.value) == (
        f"interrupted; round 1 is saved; resume with: fedllm run resume={tmp_path / 'stopped'}"
    )
    assert newest_round(tmp_path / "stopped" / "checkpoints") == 1
    expected, found = outcome(whole), outcome(resume(tmp_path / "stopped"))
    assert sorted(found) == sorted(expected)
    assert found == expected
    assert [record["round"] for record in found["metrics"]] == [0, 1, 2]


@pytest.mark.parametrize(
    "transform", ["int8", *(pytest.param(n, marks=pytest.mark.slow) for n in ("int4", "top_k"))]
)
def test_compressed_updates_go_on_with_what_was_left_out(
    transform: str, whole_run: WholeRun, tmp_path: Path
) -> None:
    chosen = ("algorithm=scaffold", f"communication={transform}", "federation.sample_clients=3")
    whole = whole_run(*chosen)
    with pytest.raises(RunInterrupted):
        run_intercepted(tmp_path / "stopped", interrupting(2, after=1), *chosen)
    assert outcome(resume(tmp_path / "stopped")) == outcome(whole)
    control = load_params(max(whole.glob("checkpoints/round-*")))[0]["state.control"]
    kept = [load_params(max(folder.glob("*.safetensors")))[0] for folder in whole.glob("clients/*")]
    for name, value in control.items():
        mean = sum(each["control"][name] for each in kept) / len(kept)
        np.testing.assert_allclose(value, mean, atol=1e-6)
    assert all(np.abs(value).max() > 0 for each in kept for value in each["residual"].values())
    up = sum(record["bytes_up"] for record in records(whole)[1:])
    down = sum(record["bytes_down"] for record in records(whole)[1:])
    assert up / down < {"int8": 0.55, "int4": 0.3, "top_k": 0.25}[transform]


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        ("communication.downlink=int8", "algorithm=scaffold", "federation.sample_clients=3"),
        ("communication.downlink=int4", "communication=int4", "task=dpo"),
        ("communication.downlink=int4", "algorithm=ffa"),
        ("communication.downlink=int8", "algorithm=rolora"),
        ("communication.downlink=int4", "algorithm=local"),
    ],
    ids=lambda chosen: chosen[1],
)
def test_a_compressed_downlink_goes_on(
    chosen: tuple[str, ...], whole_run: WholeRun, tmp_path: Path
) -> None:
    longer = (*chosen, "federation.num_rounds=3")
    whole = whole_run(*longer)
    with pytest.raises(RunInterrupted):
        run_intercepted(tmp_path / "stopped", interrupting(3, after=1), *longer)
    assert outcome(resume(tmp_path / "stopped")) == outcome(whole)
    plain = whole_run(*longer[1:])
    down, all_down = ([r["bytes_down"] for r in records(run)[1:]] for run in (whole, plain))
    assert down[0] == all_down[0]
    assert sum(down) < sum(all_down)


@pytest.mark.slow
def test_openfedllm_scaffold_goes_on_too(whole_run: WholeRun, tmp_path: Path) -> None:
    chosen = ("algorithm=scaffold", "algorithm.variant=openfedllm")
    whole = whole_run(*chosen)
    with pytest.raises(RunInterrupted):
        run_intercepted(tmp_path / "stopped", interrupting(2, after=1), *chosen)
    assert outcome(resume(tmp_path / "stopped")) == outcome(whole)


def test_interrupt_in_the_first_round_keeps_the_start(whole_run: WholeRun, tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted, match="the start is saved; resume with: fedllm run resume="):
        run_intercepted(tmp_path / "stopped", interrupting(1, after=0))
    assert outcome(resume(tmp_path / "stopped")) == outcome(whole_run("algorithm=fedavg"))


def test_interrupt_before_the_first_checkpoint_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedllm_flwr.server.run_recorder.evaluate", interrupted)
    with pytest.raises(RunInterrupted, match=r"^interrupted; nothing was kept"):
        run_tiny(tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()


def test_truncated_checkpoint_falls_back_with_a_warning(
    whole_run: WholeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = whole_run("algorithm=fedadam")
    with pytest.raises(RunInterrupted):
        run_intercepted(tmp_path / "stopped", interrupting(2, 0), "algorithm=fedadam")
    newest = tmp_path / "stopped/checkpoints/round-00001.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    state, warnings = load_state(newest.parent)
    assert state.round == 0
    assert len(warnings) == 1
    assert newest.name in warnings[0]
    config = compose([f"resume={tmp_path / 'stopped'}", "federation.engine=inprocess"])
    with Console(interactive=False) as console:
        directory = run_simulation(config, console, 0.0)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"cannot read {newest}" in shown
    assert "Falling back to the checkpoint before" in shown
    assert outcome(directory) == outcome(whole)


def test_more_rounds_are_those_of_a_longer_run(tmp_path: Path) -> None:
    constant = "training.min_learning_rate=0.005"  # else the cosine depends on num_rounds
    longer = run_tiny(tmp_path / "longer", "algorithm=fedyogi", constant, "evaluation.every=1")
    run_tiny(
        tmp_path / "run",
        "algorithm=fedyogi",
        constant,
        "evaluation.every=1",
        "federation.num_rounds=1",
    )
    extended = resume(tmp_path / "run", "federation.num_rounds=2")
    assert outcome(extended) == outcome(longer)
    # The longer run is now the run's own wish: going on needs no number.
    assert outcome(resume(tmp_path / "run")) == outcome(longer)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.learning_rate=1e-4", "training.learning_rate=0.0001"),
        ("algorithm.mu=0.5", "algorithm.mu=0.5"),
        ("seed=7", "seed=7"),
        ("data.max_samples=50", "data.max_samples=50"),
        ("communication.dtype=float32", "communication.dtype=float32"),
        ("federation.sample_clients=null", "federation.sample_clients=null"),
        ("federation.num_rounds=1", "federation.num_rounds=1"),
        ("output_dir=elsewhere", "output_dir=elsewhere"),
        ("evaluation.clients=true", "evaluation.clients=true"),
        ("data.eval_max_samples=20", "data.eval_max_samples=20"),
    ],
)
def test_changed_option_is_refused_by_name(override: str, named: str, finished: Path) -> None:
    before = records(finished)
    with pytest.raises(ConfigError) as caught:
        resume(finished, override)
    assert str(caught.value).startswith(f"{named}: ")
    assert "drop it" in str(caught.value)
    assert records(finished) == before


def test_what_may_change_changes_no_bit_of_the_adapter(tmp_path: Path, whole_run: WholeRun) -> None:
    """All keys that may change, other than those of who answers when, at once."""
    changed = {
        "checkpoint.every": "2",
        "checkpoint.keep": "1",
        "evaluation.central": "false",
        "evaluation.every": "1",
        "evaluation.batch_tokens": "64",
        "evaluation.answers": "0",
        "evaluation.max_new_tokens": "3",
        "evaluation.suites": "[]",
        "evaluation.suite_subset": "1",
        "evaluation.data_root": str(tmp_path),
        "tracking.figures": "true",
        "tracking.report": "true",
        "tracking.tensorboard": "false",
        "tracking.wandb": "false",
        "tracking.mlflow": "false",
        "tracking.project": "other",
        "tracking.trackio": "false",
        "tracking.group": "hospitals",
        "tracking.tags": "[late]",
        "checkpoint.adapters": "all",
        "evaluation.contribution": "none",
    }
    others = ("federation.", "output_dir", "resume", "training.")
    assert set(changed) == {key for key in _FREE_TO_CHANGE if not key.startswith(others)}
    assert {key.name for key in keys()} >= _FREE_TO_CHANGE
    with pytest.raises(RunInterrupted):
        run_intercepted(tmp_path / "stopped", interrupting(2, after=1), "algorithm=scaffold")
    found = outcome(resume(tmp_path / "stopped", *(f"{k}={v}" for k, v in changed.items())))
    expected = outcome(whole_run("algorithm=scaffold"))
    assert found[ADAPTER] == expected[ADAPTER]


def test_dpo_keeps_the_batches_of_its_reference(tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", "task=dpo", "federation.num_rounds=1")
    with pytest.raises(ConfigError, match=r"^evaluation\.batch_tokens=64: the run in"):
        resume(tmp_path / "run", "evaluation.batch_tokens=64", "federation.num_rounds=2")


def test_group_of_another_experiment_is_refused(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.name=scaffold: .*algorithm\.name=fedavg"):
        resume(finished, "algorithm=scaffold", *TINY, "federation.engine=inprocess")


def test_repeating_the_whole_command_goes_on(finished: Path) -> None:
    before = outcome(finished)
    resume(finished, *TINY, "algorithm=fedavg", "federation.engine=inprocess")
    assert outcome(finished) == before


def test_new_run_does_not_overwrite_an_old_one(finished: Path) -> None:
    with pytest.raises(ConfigError, match=f"holds a run already.*resume={finished}"):
        run_tiny(finished)


def test_all_checkpoints_unreadable(tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", "federation.num_rounds=1")
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        checkpoint.write_bytes(b"")
    with pytest.raises(FederationError, match=r"no readable checkpoint; start a new run\.$"):
        resume(tmp_path / "run", "federation.num_rounds=2")
    assert (tmp_path / "run/config.yaml").is_file()  # what is there of the run stays


def _seconds_of(record: dict[str, Any]) -> float:
    phases: dict[str, float] = record["phases"]
    return sum(phases.values())


@pytest.mark.slow
def test_seconds_cover_all_starts(tmp_path: Path) -> None:
    """A run that is killed, goes on, and is extended: its phases add up over the three starts."""
    with pytest.raises(RunInterrupted):
        run_intercepted(tmp_path / "run", interrupting(2, after=0))
    metrics, summary = tmp_path / "run/metrics.jsonl", tmp_path / "run/summary.json"
    killed = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["round"] for record in killed] == [0, 1]
    for record in killed[1:]:
        trained = record["phases"]["training"] + record["phases"]["federation"]
        assert trained == pytest.approx(record["seconds"])
        assert record["phases"]["checkpoints"] > 0
    assert set(killed[0]["phases"]) == {"start-up", "evaluation"}
    # As if the first start had taken a thousand seconds more.
    killed[1]["phases"]["training"] += 1000
    metrics.write_text("".join(json.dumps(record) + "\n" for record in killed))

    started, out = time.monotonic(), io.StringIO()
    run_simulation(compose([f"resume={tmp_path / 'run'}"]), Console(out), started)
    here, written = time.monotonic() - started, json.loads(summary.read_text())
    assert written["seconds"] == pytest.approx(sum(map(_seconds_of, killed)) + here, abs=0.5)
    assert sum(written["phases"].values()) == pytest.approx(written["seconds"])
    assert written["phases"]["training"] > 1000
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("Finished")]
    assert re.match(
        r"Finished in 1[678] min .* over all starts, [\d.]+ s since it was resumed: ", line
    )
    card = (tmp_path / "run/adapter/README.md").read_text()
    assert re.search(r"\| duration \| 1[678] min", card)

    started = time.monotonic()
    longer = [f"resume={tmp_path / 'run'}", "federation.num_rounds=3"]
    run_simulation(compose(longer), Console(quiet=True), started)
    here, extended = time.monotonic() - started, json.loads(summary.read_text())
    assert extended["seconds"] == pytest.approx(written["seconds"] + here, abs=0.5)
    assert sum(extended["phases"].values()) == pytest.approx(extended["seconds"])


def test_finished_run_is_left_as_it_is(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.*") if path.is_file()}
    assert cli.main(["run", f"resume={finished}"]) == 0
    assert capsys.readouterr().out == (
        f"{finished}: already finished (2 rounds); to go on, raise their number: fedllm run "
        f"resume={finished} federation.num_rounds=4\n"
    )
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*.*") if path.is_file()}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {"config.yaml"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has done all its rounds."""
    return run_tiny(tmp_path_factory.mktemp("finished") / "run", "algorithm=fedavg").path


def test_other_records_are_refused(tmp_path: Path) -> None:
    """In simulation, too; the run went on with them without a word."""
    file = tmp_path / "records.jsonl"
    lines = [
        json.dumps({"instruction": f"Say {i}.", "output": f"Number {i}."}) + "\n" for i in range(40)
    ]
    file.write_text("".join(lines))
    data = ("data=jsonl", f"data.path={file}", "data.max_samples=null", "evaluation.every=1")
    run = run_tiny(tmp_path / "run", *data, "federation.num_rounds=1")
    before, saved = outcome(run), run.config.read_text()
    file.write_text("".join(lines).replace("Number 7", "Number 8"))
    with pytest.raises(DataError) as caught:
        resume(run.path, "federation.num_rounds=2")
    assert str(caught.value).startswith(
        f"data.path={file}: its records are not those that the run in {run.path} was begun with"
    )
    assert outcome(run) == before
    assert run.config.read_text() == saved  # a refused resume changes nothing
    file.write_text("\n".join(lines))  # another layout of the same records
    assert records(resume(run.path, "federation.num_rounds=2"))[-1]["round"] == 2


RATES = ("training.learning_rate=1e-3", "training.min_learning_rate=1e-5")


@pytest.mark.parametrize("span", [4, 2])
def test_extension_says_what_becomes_of_the_learning_rate(
    span: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a cosine over 4 rounds is at 5.05e-4 in round 3; that over 2 has reached its end."""
    run_tiny(tmp_path / "run", *RATES)
    typed = [f"resume={tmp_path / 'run'}", "federation.num_rounds=4"]
    keeps = ["training.schedule_rounds=2"] if span == 2 else []
    with Console(interactive=False) as console:
        run_simulation(compose([*typed, *keeps]), console, 0.0)
    said = (
        "the learning rate now follows a cosine over 4 rounds instead of 2: 5.1e-04 in round 3, "
        "where the curve so far has 1.0e-05; training.schedule_rounds=2 keeps that curve"
    )
    assert (said in " ".join(capsys.readouterr().out.split())) == (span == 4)
    third, fourth = (5.05e-4, 1e-5 + 9.9e-4 * (1 - 0.5**0.5) / 2) if span == 4 else (1e-5, 1e-5)
    found = [record.get("learning_rate") for record in records(tmp_path / "run")[1:]]
    assert found == pytest.approx([1e-3, 5.05e-4, third, fourth])
