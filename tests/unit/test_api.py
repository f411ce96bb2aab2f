"""The Python interface: the page's snippets, what `data=` takes, and what it refuses."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

import fedllm_flwr as fed
from fedllm_flwr import api
from fedllm_flwr.data.record_files import open_records, refuse
from fedllm_flwr.errors import ConfigError, DataError

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
ROWS = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": None}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(data: Any) -> list[dict[str, Any]]:
    """The records that a run would read."""
    overrides = dict(text.split("=", 1) for text in api._data_overrides(data, None))
    return [row for file in open_records(Path(overrides["data.path"])) for row in file.read(refuse)]


def test_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    run = names["run"]
    seen = re.findall(r"^(\d) (None|[\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [number for number, _ in seen] == ["0", "1", "2"]
    assert list(run.metrics.index) == [0, 1, 2, 3]
    assert run.metrics["eval/loss"].iloc[-1] < run.metrics["eval/loss"].iloc[0]
    assert set(run.clients.index.get_level_values("client")) == {"amber", "birch"}
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"
    assert run.summary["rounds"] == 3
    assert run.config.algorithm.name == "scaffold"


def test_records_of_every_kind_arrive_alike(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "rows.jsonl"
    pandas.DataFrame(ROWS).to_json(path, orient="records", lines=True)
    for data in (ROWS, iter(ROWS), pandas.DataFrame(ROWS), datasets.Dataset.from_list(ROWS), path):
        assert written(data) == ROWS
    assert len(list((cache / "given").iterdir())) == 1  # the same content, the same file


def test_each_client_its_own() -> None:
    data = {"amber": ROWS, "birch": pandas.DataFrame(ROWS[:1])}
    assert [(row["client"], row["instruction"]) for row in written(data)] == [
        ("amber", "a"),
        ("amber", "c"),
        ("birch", "a"),
    ]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "no records were given"),
        (["text"], "record 1: str, not a dict"),
        ([{"instruction": {1, 2}}], "a set cannot be written as JSON"),
        ({"amber": [{"client": "birch"}]}, "a column 'client' already, with the value 'birch'"),
    ],
)
def test_what_is_no_record_is_refused(data: Any, says: str, cache: Path) -> None:
    with pytest.raises(DataError, match=says):
        fed.run(data=data)
    given = cache / "given"
    assert not given.exists() or not list(given.iterdir())


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        fed.Run(tmp_path)


def test_an_error_in_on_round_ends_the_run_which_goes_on(tmp_path: Path) -> None:
    overrides = ("federation.engine=inprocess", "federation.num_rounds=2", "training.max_steps=1")
    place = tmp_path / "run"

    def fail(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fed.run(
            *overrides,
            f"output_dir={place}",
            "evaluation.central=false",
            on_round=fail,
            quiet=True,
        )
    assert fed.Run(place).summary is None
    assert fed.Run(place).resume(quiet=True).summary is not None


def test_importing_the_package_stays_light() -> None:
    heavy = "{'torch', 'pandas', 'flwr'}"
    code = f"import fedllm_flwr as fed, sys; fed.run; print({heavy} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
