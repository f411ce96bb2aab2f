"""The best adapter is kept and found again, and a run may end once no better one comes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm_flwr.commands import main as cli
from fedllm_flwr.config.compose import load_yaml
from fedllm_flwr.errors import ConfigError, RunInterrupted
from fedllm_flwr.evaluation.central import evaluate
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.runs.adapter_files import load_kept
from fedllm_flwr.runs.kept_adapters import find_adapter, find_adapters
from fedllm_flwr.server.preparation import evaluation_threads, held_out_records
from tiny_runs import interrupting, outcome, records, resume, run_intercepted, run_tiny

# At this learning rate the loss on held-out records is lowest after round 3.
WORSE = (
    *("seed=3", "training.learning_rate=0.2", "training.min_learning_rate=0.2"),
    *("evaluation.every=1", "federation.num_rounds=5"),
)
BEST = 3


@pytest.fixture(scope="module")
def run(whole_run: Callable[..., Path]) -> Path:
    return whole_run(*WORSE)


def loss_of(typed: str) -> float:
    """The loss of an adapter on the held-out records of its run, loaded anew."""
    kept = find_adapter(typed)
    config = kept.config
    model = load_model(config)
    data = held_out_records(config, model)
    assert data is not None
    tokens, threads = config.evaluation.batch_tokens, evaluation_threads(config)
    return evaluate(model, load_kept(kept, model), data, tokens, threads)["loss"]


def logged(run: Path) -> list[float]:
    return [record["eval"]["loss"] for record in records(run)]


def test_reload_of_the_best_gives_the_logged_score(run: Path) -> None:
    """It was lost: checkpoint.keep=2 leaves rounds 4 and 5."""
    losses = logged(run)
    assert min(losses) == losses[BEST] < 0.9 * losses[-1]
    assert loss_of(f"{run}@best") == losses[BEST]
    assert loss_of(str(run / "adapter-best")) == losses[BEST]
    score = json.loads((run / "adapter-best/score.json").read_text())
    assert score == {"round": BEST, **records(run)[BEST]["eval"]}
    assert f"{losses[BEST]:.3f}" in (run / "adapter-best/README.md").read_text()


def test_every_kept_round_is_found(run: Path) -> None:
    losses = logged(run)
    assert loss_of(str(run)) == loss_of(f"{run}@final") == losses[5]
    for number in (3, 4, 5):  # the best, and the two newest
        assert loss_of(f"{run}@round={number}") == losses[number]
    with pytest.raises(ConfigError) as caught:
        find_adapter(f"{run}@round=2")
    assert str(caught.value).startswith(
        f"{run}@round=2: round 2 is not kept; kept: round 5, round 4, best (round 3)"
    )


def test_closing_table_names_the_best(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()  # as if it had been killed while it wrote the results
    assert cli.main(["run", f"resume={tmp_path / 'run'}"]) == 0
    shown = capsys.readouterr().out
    best = logged(run)[BEST]
    assert re.search(rf"^  best \(round 3\) +{best:.3f}", shown, re.MULTILINE)
    assert re.search(r"best \(round 3\)   \.\.\./adapter-best", shown)
    assert f"fedllm generate {tmp_path / 'run'}@best" in shown


def test_early_stopping_is_the_same_run_cut_short(run: Path, tmp_path: Path) -> None:
    """Also of a run that was stopped in between: the number of evaluations is not counted anew."""
    stopping = (*WORSE[:-1], "federation.num_rounds=9", "training.early_stopping=2")
    whole = run_tiny(tmp_path / "whole", *stopping)
    assert records(whole) == records(run)
    assert find_adapter(f"{whole.path}@best").label == "best (round 3)"
    with pytest.raises(RunInterrupted):
        run_intercepted(tmp_path / "stopped", interrupting(5, after=1), *stopping)
    assert outcome(resume(tmp_path / "stopped")) == outcome(whole)


def test_a_run_that_was_stopped_early_is_finished(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    config = load_yaml(copy / "config.yaml")
    text = (copy / "config.yaml").read_text()
    text = text.replace("num_rounds: 5", "num_rounds: 9")
    text = text.replace("early_stopping: null", "early_stopping: 2")
    (copy / "config.yaml").write_text(text)
    assert config.training.early_stopping is None
    assert cli.main(["run", f"resume={copy}"]) == 0
    said = "already finished (training.early_stopping=2 ended it after round 5 of 9); to continue: "
    assert said in " ".join(capsys.readouterr().out.split())
    assert find_adapter(str(copy)).label == "final"
    assert cli.main(["status", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert "finished, stopped early after 5 of 9 rounds" in shown
    assert f"best        round 3, eval loss {logged(run)[BEST]:.3f}" in shown


@pytest.mark.parametrize("damage", ["missing", "moved away", "of a round that is run again"])
def test_best_adapter_of_a_killed_run_is_put_right(damage: str, run: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    with pytest.raises(RunInterrupted):
        run_intercepted(stopped, interrupting(4, after=1), *WORSE)
    best = stopped / "adapter-best"
    assert json.loads((best / "score.json").read_text())["round"] == 3
    if damage == "missing":  # killed after the checkpoint of round 3, before its adapter
        shutil.rmtree(best)
    elif damage == "moved away":  # killed between two renames
        (stopped / ".adapter-best.x").mkdir()
        best.rename(stopped / ".adapter-best.x/old")
    else:
        (best / "score.json").write_text('{"round": 4}')
        (best / "adapter_model.safetensors").write_bytes(b"of another life")
    assert outcome(resume(stopped)) == outcome(run)
    assert loss_of(f"{stopped}@best") == logged(run)[BEST]
    assert not list(stopped.glob(".*"))


def test_an_unfinished_run_gives_its_newest_round_and_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = tmp_path / "stopped"
    with pytest.raises(RunInterrupted):
        run_intercepted(stopped, interrupting(3, after=1), *WORSE)
    assert loss_of(str(stopped)) == logged(run)[2]
    note = f"{stopped} has not finished: the adapter of round 2 of 5 is used\n"
    assert cli.main(["generate", str(stopped), "Profit fell.", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith(note)
    assert cli.main(["merge", str(stopped), str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out.startswith(note)


def test_local_keeps_the_best_of_every_client(tmp_path: Path) -> None:
    """One round for all: that of the lowest mean loss."""
    options = ("algorithm=local", "training.learning_rate=0.02", "evaluation.every=1")
    rounds = ("federation.num_rounds=4", "training.schedule_rounds=5")
    run = run_tiny(tmp_path / "run", *options, *rounds).path
    log = records(run)
    best = min(log, key=lambda record: record["eval"]["loss"])
    assert 0 < best["round"] < 4
    for name, scores in best["local"].items():
        assert loss_of(f"{run}@best,client={name}") == scores["loss"]
        assert loss_of(f"{run}@client={name}") == log[-1]["local"][name]["loss"]
        assert loss_of(f"{run}@round=4,client={name}") == log[-1]["local"][name]["loss"]
    assert [kept.client for kept in find_adapters(f"{run}@best")] == sorted(best["local"])
    with pytest.raises(ConfigError, match=r"choose one, such as .*@best,client=client-0"):
        find_adapter(f"{run}@best")
    with pytest.raises(ConfigError, match="no client 'x' there; choose from client-0, client-1"):
        find_adapter(f"{run}@client=x")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("training.early_stopping=2", "evaluation.every=0"),
            "evaluation.every=0 has none between start and end",
        ),
        (
            ("training.early_stopping=2", "evaluation.central=false"),
            "needs scores: set evaluation.central=true or",
        ),
        (("training.early_stopping=0",), "must be > 0, got 0"),
    ],
)
def test_early_stopping_without_scores_is_refused(
    overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_tiny(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()
