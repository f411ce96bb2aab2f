"""Local files of benchmarks, as rows of the schema that the hub's data set has.

A reader takes the paths of a task's files and the name of the harness task, and returns the rows of
each split. Its name stands in ``suite.yaml``.
"""

import csv
import gzip
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedllm_flwr.errors import DataError
from fedllm_flwr.suites.catalogue import SuiteTask

Row = dict[str, Any]
Splits = dict[str, list[Row]]
# As FinGPT's benchmark files store it
_FINGPT_PROMPT = re.compile(
    r"\s*Instruction:\s*(?P<instruction>.*?)\s*\nInput:\s*(?P<input>.*?)\s*\nAnswer:\s*", re.DOTALL
)
Reader = Callable[[Sequence[Path], str], Splits]


def missing_files(task: SuiteTask, root: Path) -> list[Path]:
    """Files of a task that are not below `root`; files of single parts are checked when read."""
    return [root / name for name in task.files if "{" not in name and not (root / name).is_file()]


def local_settings(task: SuiteTask, part: str, root: Path) -> dict[str, Any]:
    """What makes a harness task read local files: its rows, and the splits that there are.

    Args:
        part: the harness task; ``{}`` in the names of files stands for its subject.

    Raises:
        DataError: names the file that is missing or cannot be read.
    """
    import datasets

    if not task.files:
        raise DataError(f"{task.name}: cannot be read from local files; drop --data-root.")
    subject = part.removeprefix(task.settings.get("prefix", ""))
    paths = [root / name.replace("{}", subject) for name in task.files]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{task.name}: {path} is missing; it holds {task.source}.")
    splits = READERS[task.reader](paths, subject)
    data = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    )
    absent = {"training_split": None, "validation_split": None, "test_split": "test"}
    solved = next((name for name in ("train", "dev") if name in splits), None)
    examples = {"fewshot_split": solved} if solved else {}
    return {"custom_dataset": lambda **_: data, **absent, **examples, **task.local}


def read_rows(path: Path) -> list[Row]:
    """Records of a file: a JSON list, JSON lines, or CSV; also compressed by gzip.

    Raises:
        DataError: names the file and the line.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    name = path.name.removesuffix(".gz")
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            if name.endswith(".csv"):
                return list(csv.DictReader(file))
            if name.endswith(".jsonl"):
                return [json.loads(line) for line in file if line.strip()]
            rows: Any = json.load(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    return rows if isinstance(rows, list) else [rows]


def _same(paths: Sequence[Path], _: str) -> Splits:
    """Rows that are in the hub's schema already."""
    return {"test": read_rows(paths[0])}


def _finance(paths: Sequence[Path], _: str) -> Splits:
    """FinGPT's rows: {context, target}, the finished prompt, or {instruction, input, output}."""
    rows = []
    for row in read_rows(paths[0]):
        if "context" in row:
            match = _FINGPT_PROMPT.fullmatch(row["context"])
            asked = (match["instruction"], match["input"]) if match else (row["context"], "")
            answer = row["target"]
        else:
            asked, answer = (row["instruction"], row["input"]), row["output"]
        rows.append({"instruction": asked[0], "input": asked[1], "answer": answer.strip().lower()})
    return {"test": rows}


READERS: dict[str, Reader] = {"same": _same, "finance": _finance}
