"""The command line, as far as argparse decides on it."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedllm_flwr.commands import main as cli


@pytest.fixture
def choices(tmp_path: Path) -> Path:
    """A directory of further choices of the groups."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("name: mine\npath: embedded\n")
    return tmp_path


@pytest.mark.parametrize("place", [0, 1, 2])
def test_options_stand_anywhere_among_overrides(
    place: int, choices: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["seed=3", "data=mine"]
    typed = [*overrides[:place], "--config-dir", str(choices), *overrides[place:]]
    assert cli.main(["config", *typed]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["seed"], shown["data"]["name"]) == (3, "mine")


MISTYPED = {
    "trian": "fedllm has no command 'trian'. Did you mean 'fedllm run'?",
    "evalute --base embedded": "Did you mean 'fedllm evaluate'?",
    "server strat": "fedllm server has no step 'strat'",
    "run --num-rounds 3": "Did you mean federation.num_rounds=3?",
    "run --num-rounds=3": "Did you mean federation.num_rounds=3?",
    "run seed=1 --lr 1e-4 algorithm=fedavg": "Did you mean training.learning_rate=1e-4?",
    "run --mutlirun seed=1,2": "Did you mean --multirun?",
    "run seed=1 --confg-dir x": "Did you mean --config-dir?",
    "run --zzzz": "fedllm run has no option --zzzz; fedllm run --help lists",
    "merge run merged more": "'more' is one argument too many",
    "generate": "fedllm generate: missing run, prompt",
    "evaluate --limit many": "fedllm evaluate: --limit: invalid int value: 'many'",
    "evaluate --prompt chta": "--prompt chta: choose from trained, raw, chat. Did you mean 'chat'?",
}


@pytest.mark.parametrize("typed", MISTYPED)
def test_mistyped_arguments_get_one_line_with_what_was_meant(
    typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(typed.split()) == cli.WRONG_USE
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert MISTYPED[typed] in shown
    assert shown.count("\n") == 1


def test_unforeseen_error_leaves_its_trace_in_the_file_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fedllm_flwr.commands.status.command.status", lambda *_: {}["answer"])
    assert cli.main(["status", "somewhere"]) == cli.FAILED
    shown = capsys.readouterr().err
    assert shown.startswith("error: unforeseen KeyError: 'answer'")
    assert shown.count("\n") == 1
    assert "Traceback" not in shown
    (log,) = (tmp_path / "cache" / "errors").iterdir()
    assert str(log) in shown
    written = log.read_text()
    assert "fedllm status somewhere" in written
    assert "Traceback (most recent call last)" in written
    assert "KeyError: 'answer'" in written


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "no space left on the disk of"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left on the"),
        (
            PermissionError(errno.EACCES, "Permission denied", "out"),
            "error: out: Permission denied",
        ),
        (MemoryError(), "lower training.micro_batch_size"),
    ],
)
def test_errors_of_the_machine_say_what_to_do(
    error: Exception,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    monkeypatch.setattr("fedllm_flwr.commands.status.command.status", fail)
    assert cli.main(["status", "somewhere"]) == cli.FAILED
    shown = capsys.readouterr().err
    assert said in shown
    assert "defect" not in shown
    assert shown.count("\n") == 1


def test_reader_that_leaves_early_costs_no_trace() -> None:
    """`fedllm config --list | head`: the pipe is closed before all is written."""
    command = [sys.executable, "-m", "fedllm_flwr.commands.main", "config", "--list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (cli.NO_READER, b"")


RUN_MISTAKES = {
    "no directory": (["generate", "{}/none", "Hi"], "{}/none: no such directory"),
    "a file": (["generate", "{}/notes.txt", "Hi"], "{}/notes.txt: holds no run"),
    "a broken configuration": (["generate", "{}/broken", "Hi"], "{}/broken: not valid YAML"),
    "a run without a round": (["generate", "{}/stopped", "Hi"], "{}/stopped: no adapter there"),
    "no such choice": (
        ["generate", "{}/stopped@newest", "Hi"],
        "{}/stopped@newest: '@newest' names no adapter; give DIR, DIR@best, DIR@round=N or",
    ),
    "no best one": (
        ["merge", "{}/stopped@best", "{}/merged"],
        "{}/stopped@best: no best adapter there, for no round has been scored on held-out",
    ),
    "a round that is not kept": (
        ["generate", "{}/stopped@round=8", "Hi"],
        "{}/stopped@round=8: round 8 is not kept; kept: none",
    ),
    "a client of a federation": (
        ["generate", "{}/stopped@client=a", "Hi"],
        "{}/stopped@client=a: algorithm=fedavg has one adapter for all clients; drop client=a.",
    ),
    "two choices": (
        ["generate", "{}/stopped@best,round=2", "Hi"],
        "{}/stopped@best,round=2: give best or round=2, not both.",
    ),
    "no tokens": (
        ["generate", "{}/stopped", "Hi", "--max-new-tokens", "0"],
        "--max-new-tokens must be > 0, got 0.",
    ),
    "merging nothing": (["merge", "{}/none", "{}/merged"], "{}/none: no such directory"),
    "merging below a file": (
        ["merge", "{}/stopped", "{}/notes.txt/merged"],
        "{}/notes.txt/merged: {}/notes.txt is a file; give another directory",
    ),
    "resuming a file": (["run", "resume={}/notes.txt"], "resume={}/notes.txt: holds no run"),
    "resuming a broken one": (["run", "resume={}/broken"], "resume={}/broken: not valid YAML"),
}


@pytest.mark.parametrize("case", RUN_MISTAKES)
def test_a_run_that_is_none_is_named_as_it_was_typed(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for folder in ("broken", "stopped"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("a: [1\n")
    (tmp_path / "stopped" / "config.yaml").write_text("data: {path: embedded}\n")
    typed, message = RUN_MISTAKES[case]
    assert cli.main([text.replace("{}", str(tmp_path)) for text in typed]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message.replace('{}', str(tmp_path))}")
    assert shown.count("\n") == 1
