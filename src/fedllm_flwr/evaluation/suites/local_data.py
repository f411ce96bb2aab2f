"""Local files of benchmarks, read as rows with the schema of the hub's data set.

A reader, named in ``suite.yaml``, takes the paths of a task's files and returns the rows of each
split.
"""

import csv
import gzip
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedllm_flwr.errors import DataError
from fedllm_flwr.evaluation.suites.catalogue import SuiteTask
from fedllm_flwr.evaluation.suites.tasks.reading import shuffled_options

Row = dict[str, Any]
Splits = dict[str, list[Row]]
# The format of FinGPT's benchmark files
_FINGPT_PROMPT = re.compile(
    r"\s*Instruction:\s*(?P<instruction>.*?)\s*\nInput:\s*(?P<input>.*?)\s*\nAnswer:\s*", re.DOTALL
)
_DROP_PROMPT = re.compile(
    r"Passage: (?P<passage>.*)\nQuestion: (?P<question>.*?)\nAnswer:\s*", re.DOTALL
)
Reader = Callable[[Sequence[Path]], Splits]


def missing_files(task: SuiteTask, root: Path) -> list[Path]:
    """Files of a task that are missing in `root`."""
    parts = task.harness or ("",)  # tasks of other runners have no parts
    return [path for part in parts for path in _paths(task, part, root) if not path.is_file()]


def _paths(task: SuiteTask, part: str, root: Path) -> list[Path]:
    """Files of one harness task; ``{}`` in their names is replaced by its subject."""
    subject = part.removeprefix(task.settings.get("prefix", ""))
    return [root / name.replace("{}", subject) for name in task.files]


def local_settings(task: SuiteTask, part: str, root: Path) -> dict[str, Any]:
    """Settings that make a harness task use local files: its rows and splits.

    Raises:
        DataError: names the file that is missing or unreadable.
    """
    import datasets

    if not task.files:
        raise DataError(f"{task.name} cannot be read from local files; remove --data-root.")
    paths = _paths(task, part, root)
    for path in paths:
        if not path.is_file():
            raise DataError(f"{task.name}: {path} is missing; it holds {task.source}.")
    splits = READERS[task.reader](paths)
    data = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    )
    absent = {"training_split": None, "validation_split": None, "test_split": "test"}
    solved = next((name for name in ("train", "dev") if name in splits), None)
    examples = {"fewshot_split": solved} if solved else {}
    return {"custom_dataset": lambda **_: data, **absent, **examples, **task.local}


def read_rows(path: Path) -> list[Row]:
    """Records of a file: a JSON list, JSON lines or CSV, optionally gzipped.

    Raises:
        DataError: names the file and the line.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    name = path.name.removesuffix(".gz")
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            if name.endswith(".csv"):
                return list(csv.DictReader(file))
            text = file.read().strip()
        if name.endswith(".jsonl") or "}\n{" in text or not text:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        rows: Any = json.loads(text)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    return rows if isinstance(rows, list) else [rows]


def _same(paths: Sequence[Path]) -> Splits:
    """Rows that already have the hub's schema."""
    return {"test": read_rows(paths[0])}


def _finance(paths: Sequence[Path]) -> Splits:
    """FinGPT's rows: {context, target} with the whole prompt, or {instruction, input, output}."""
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


def _mmlu(paths: Sequence[Path]) -> Splits:
    """Hendrycks' headerless files (question, four options, letter): test, then dev."""

    def rows(path: Path) -> list[Row]:
        with path.open(encoding="utf-8", newline="") as file:
            lines = [line for line in csv.reader(file) if line]
        if any(len(line) != 6 or line[5] not in "ABCD" for line in lines):
            raise DataError(f"{path}: a line does not have a question, four options and a letter.")
        return [
            {"question": line[0], "choices": line[1:5], "answer": "ABCD".index(line[5])}
            for line in lines
        ]

    return {"test": rows(paths[0]), "dev": rows(paths[1])}


def _lettered(paths: Sequence[Path], asked: str, options: Sequence[str], right: str) -> Splits:
    """Questions with options A to D, in the hub's columns."""
    rows = []
    for row in read_rows(paths[0]):
        answer = row["answer_idx"]
        if answer not in tuple("ABCD"):
            raise DataError(f"{paths[0]}: a row has answer_idx {answer!r}; give A, B, C or D.")
        texts = [row["options"][letter] for letter in "ABCD"]
        columns = dict(zip(options, texts, strict=True))
        rows.append({asked: row["question"], **columns, right: "ABCD".index(answer)})
    return {"test": rows}


def _pubmedqa(paths: Sequence[Path]) -> Splits:
    """The labelled set, and the ids and answers of its test split, which are sorted by answer."""
    labelled, answers = read_rows(paths[0])[0], read_rows(paths[1])[0]
    rows = [
        {
            "context": "\n".join(row["CONTEXTS"]),
            "question": row["QUESTION"],
            "answer": answers[key],
        }
        for key, row in labelled.items()
        if key in answers
    ]
    return {"test": rows}


def _bbh(paths: Sequence[Path]) -> Splits:
    """BIG-Bench Hard's files: {examples: [{input, target}]}."""
    return {"test": read_rows(paths[0])[0]["examples"]}


def _drop(paths: Sequence[Path]) -> Splits:
    """Whole prompts {context, ref_text}; correct answers separated by |, their spans joined."""
    rows = []
    for row in read_rows(paths[0]):
        match = _DROP_PROMPT.fullmatch(row["context"])
        if match is None:
            raise DataError(f"{paths[0]}: a context is not 'Passage: ... Question: ... Answer:'.")
        answers = [[text] for text in row["ref_text"].split("|")]
        rows.append({**match.groupdict(), "answers": answers})
    return {"test": rows}


def _crass(paths: Sequence[Path]) -> Splits:
    """BIG-bench's file: {examples: [{input, target_scores}]}."""
    rows = []
    for i, row in enumerate(read_rows(paths[0])[0]["examples"]):
        options = list(row["target_scores"])
        right = max(range(len(options)), key=lambda k: row["target_scores"][options[k]])
        rows.append({"question": row["input"], **shuffled_options(options, right, i)})
    return {"test": rows}


READERS: dict[str, Reader] = {
    "same": _same,
    "finance": _finance,
    "mmlu": _mmlu,
    "medqa": partial(
        _lettered, asked="sent1", options=[f"ending{i}" for i in range(4)], right="label"
    ),
    "medmcqa": partial(
        _lettered, asked="question", options=[f"op{letter}" for letter in "abcd"], right="cop"
    ),
    "pubmedqa": _pubmedqa,
    "bbh": _bbh,
    "drop": _drop,
    "crass": _crass,
}
