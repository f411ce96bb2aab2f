"""Wrong inputs to every command: one line that says what to do, and nothing left behind.

``docs/errors.md`` shows each with its message. After a change of wording:
``FEDLLM_WRITE_DOCS=1 pytest tests/integration/test_errors.py``. How long each takes as a process of
its own: ``scripts/measure_errors.py``.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm_flwr.commands import main as cli
from tiny_runs import run_tiny
from wrong_inputs import WRONG_INPUTS, WrongInput, make_place

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
ALL = [row for rows in WRONG_INPUTS.values() for row in rows]
LEAST = 120  # wrong inputs over all commands


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory, with what the mistakes are about."""
    folder = tmp_path_factory.mktemp("place")
    make_place(folder)
    return folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    # As on a machine where it is not installed; finders look here before they search.
    monkeypatch.setitem(sys.modules, "wandb", None)
    return place


@pytest.fixture(scope="module")
def said() -> dict[WrongInput, tuple[int, str, set[Path]]]:
    """Status, standard error and what was left, of each wrong input that was typed already."""
    return {}


Said = dict[WrongInput, tuple[int, str, set[Path]]]


def typed(
    row: WrongInput, place: Path, said: Said, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, set[Path]]:
    """What comes of a wrong input; typed once."""
    if row not in said:
        before = _paths(place)
        capsys.readouterr()
        status = cli.main(row.arguments)
        said[row] = status, capsys.readouterr().err, _paths(place) - before
    return said[row]


def _paths(place: Path) -> set[Path]:
    return {path.relative_to(place) for path in place.rglob("*")}


@pytest.mark.parametrize("row", ALL, ids=lambda row: f"{row.typed} ({row.what})"[:70])
def test_wrong_input_costs_one_line(
    row: WrongInput, inside: Path, said: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    status, shown, left = typed(row, inside, said, capsys)
    assert shown.startswith("error: ")
    assert row.says in shown
    assert shown.count("\n") == 1, shown
    assert "Traceback" not in shown
    assert "unforeseen" not in shown
    assert status == row.status
    assert left == set()  # no half-made run


def test_there_are_enough_and_of_every_command() -> None:
    assert len(ALL) == len({row.typed for row in ALL}) >= LEAST
    commands = {row.typed.split()[0] for row in ALL if row.typed}
    (choices,) = (each.choices for each in cli._parser()._actions if each.choices)
    assert commands >= set(choices)


PROCESSES = [
    "run --num-rounds 3",
    "status folder",
    pytest.param("run model=custom model.path=./short_context", marks=pytest.mark.slow),
    pytest.param("run output_dir=folder", marks=pytest.mark.slow),
    pytest.param("evaluate --base embedded --suite finence", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("line", PROCESSES)
def test_a_process_says_the_same(
    line: str, inside: Path, said: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = (row for row in ALL if row.typed == line)
    status, shown, _ = typed(row, inside, said, capsys)
    command = [sys.executable, "-m", "fedllm_flwr.commands.main", *row.arguments]
    before = _paths(inside)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (status, shown)
    assert _paths(inside) == before


def test_tokenizer_without_pad_token_works(inside: Path, tmp_path: Path) -> None:
    """Nothing is wrong with it: padding is masked, any token serves."""
    directory = run_tiny(tmp_path / "run", "model=custom", "model.path=./no_pad", "training=tiny")
    assert directory.adapter.is_dir()


def test_page_is_true(inside: Path, said: Said, capsys: pytest.CaptureFixture[str]) -> None:
    page = _page({row: typed(row, inside, said, capsys)[1] for row in ALL}, inside)
    if os.environ.get("FEDLLM_WRITE_DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page


def _page(messages: dict[WrongInput, str], place: Path) -> str:
    lines = [
        "# Error messages",
        "",
        "A user error ends `fedllm` with status 2 and one line on standard error, before anything",
        "has started, and leaves no files behind; under `flwr run` the same line is in the log. A",
        "run that failed ends with status 1, an interrupted one with 130. An unexpected error is",
        "also reported in one line, which names a file with the traceback.",
        "",
        f"Each of these {len(ALL)} commands is run by `tests/integration/test_errors.py`, which",
        "also writes this page; `scripts/measure_errors.py` measures how long each takes.",
    ]
    for title, rows in WRONG_INPUTS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| error | `fedllm ...` | message |",
            "|---|---|---|",
        ]
        for row in rows:
            message = _portable(messages[row], place).replace("|", "\\|")
            lines.append(f"| {row.what} | `{row.typed or ' '}` | {message} |")
    return "\n".join(lines) + "\n"


def _portable(shown: str, place: Path) -> str:
    """Without what differs between machines: directories, and the number of CPUs."""
    text = re.sub(re.escape(str(place.resolve())) + "/?", "", shown.strip())
    text = re.sub(re.escape(str(place)) + "/?", "", text)
    text = re.sub(r"this machine has \d+ CPUs?", "this machine has 2 CPUs", text)
    return re.sub(r"client_cpus=\d+ or less", "client_cpus=2 or less", text)
