"""Questions of the open-ended benchmarks, read from local copies of their published files."""

from dataclasses import dataclass
from pathlib import Path

from fedllm_flwr.errors import DataError
from fedllm_flwr.evaluation.suites.local_data import Row, read_rows

# FastChat's temperatures of MT-Bench by category; others, and all of Vicuna bench, use 0.7.
_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_OTHER_TEMPERATURE = 0.7
_NEEDS_REFERENCE = ("math", "reasoning", "coding")


@dataclass(frozen=True)
class OpenQuestion:
    """An open-ended question of one or more turns."""

    id: str  # unique within its benchmark
    category: str
    turns: tuple[str, ...]
    temperature: float
    reference: tuple[str, ...] = ()  # a correct answer per turn, for the judge
    baseline: str | None = None  # the answer to compare with


def mt_bench(folder: Path) -> list[OpenQuestion]:
    """MT-Bench, with GPT-4's answers as references for the categories that need them.

    Raises:
        DataError: a file or a reference is missing, or a file is invalid.
    """
    references = {
        row["question_id"]: tuple(row["choices"][0]["turns"])
        for row in _rows(folder / "mtbench_reference_answer/gpt-4.jsonl", "question_id", "choices")
    }
    file = folder / "mtbench_question.jsonl"
    found = []
    for row in _rows(file, "question_id", "category", "turns"):
        needed = row["category"] in _NEEDS_REFERENCE
        if needed and row["question_id"] not in references:
            raise DataError(
                f"{file}: question {row['question_id']} ({row['category']}) has no reference "
                "answer in mtbench_reference_answer/gpt-4.jsonl; copy both files from one version."
            )
        temperature = _TEMPERATURES.get(row["category"], _OTHER_TEMPERATURE)
        reference = references[row["question_id"]] if needed else ()
        found.append(
            OpenQuestion(
                str(row["question_id"]),
                row["category"],
                tuple(row["turns"]),
                temperature,
                reference,
            )
        )
    return found


def vicuna_bench(folder: Path) -> list[OpenQuestion]:
    """Vicuna bench."""
    return [
        OpenQuestion(
            str(row["question_id"]), row["category"], tuple(row["turns"][:1]), _OTHER_TEMPERATURE
        )
        for row in _rows(folder / "vicuna_question.jsonl", "question_id", "category", "turns")
    ]


def advbench(folder: Path) -> list[OpenQuestion]:
    """AdvBench's harmful requests, without an adversarial suffix."""
    goals = [row["goal"] for row in _rows(folder / "advbench.csv", "goal")]
    return [OpenQuestion(str(i), "harmful", (goal,), 0.0) for i, goal in enumerate(goals)]


def alpaca_eval(file: Path) -> list[OpenQuestion]:
    """The instructions of a file of baseline answers, with these answers as baselines.

    The file is a JSON list or JSON lines with instruction and output, like AlpacaEval's files.
    """
    found = []
    for i, row in enumerate(_rows(file, "instruction", "output")):
        asked = (
            f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
        )
        category, baseline = str(row.get("dataset", "")), str(row["output"])
        found.append(
            OpenQuestion(str(i), category, (str(asked),), _OTHER_TEMPERATURE, baseline=baseline)
        )
    return found


def _rows(file: Path, *keys: str) -> list[Row]:
    """Records of a file, which must all have `keys`."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; give the data folder with --data-root.")
    rows = read_rows(file)
    if not rows:
        raise DataError(f"{file}: the file is empty.")
    for number, row in enumerate(rows, start=1):
        missing = [key for key in keys if not isinstance(row, dict) or row.get(key) is None]
        if missing:
            raise DataError(f"{file}, record {number}: no {missing[0]}; copy the file again.")
    return rows
