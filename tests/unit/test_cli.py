"""The command line, as far as argparse decides on it."""

from pathlib import Path

import pytest
import yaml

from fedllm_flwr import cli


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


@pytest.mark.parametrize(
    "typed",
    [["run", "seed=1", "--confg-dir", "x"], ["merge", "run", "merged", "more"], ["run", "--lr=1"]],
)
def test_unknown_arguments_are_refused(
    typed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(typed)
    assert caught.value.code == 2
    assert "unrecognized arguments: " in capsys.readouterr().err


RUN_MISTAKES = {
    "no directory": (["generate", "{}/none", "Hi"], "{}/none: no such directory"),
    "a file": (["generate", "{}/notes.txt", "Hi"], "{}/notes.txt: holds no run"),
    "a broken configuration": (["generate", "{}/broken", "Hi"], "{}/broken: not valid YAML"),
    "an unfinished run": (["generate", "{}/stopped", "Hi"], "{}/stopped: no adapter there"),
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
    assert cli.main([text.replace("{}", str(tmp_path)) for text in typed]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message.replace('{}', str(tmp_path))}")
    assert shown.count("\n") == 1
