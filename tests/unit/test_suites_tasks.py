"""How answers are read, and local files."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.evaluation.suites.catalogue import all_suites, chosen_suites, chosen_tasks
from fedllm_flwr.evaluation.suites.harness import _load
from fedllm_flwr.evaluation.suites.local_data import (
    READERS,
    local_settings,
    missing_files,
    read_rows,
)
from fedllm_flwr.evaluation.suites.options import RunOptions
from fedllm_flwr.evaluation.suites.tasks import reading
from fedllm_flwr.evaluation.suites.tasks.finance import (
    by_generation,
    headline_by_generation,
    headline_by_likelihood,
    parse_label,
)
from fedllm_flwr.evaluation.suites.tasks.numbers import chosen_letter, last_number
from fedllm_flwr.evaluation.suites.tasks.reading import shuffled_options


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("positive", "positive"),
        (" Neutral.", "neutral"),
        ("The sentiment is negative", "negative"),
        ("positive or negative", None),
        ("positively", None),
        ("", None),
        ("good\npositive", None),
    ],
)
def test_labels_in_answers(answer: str, label: str | None) -> None:
    assert parse_label(answer) == label
    scored = by_generation({"answer": "positive"}, [answer])
    assert scored == {"prediction": ["positive", label], "unparsable": float(label is None)}


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Yes", "yes"),
        (" no.", "no"),
        ("NO, it does not", "no"),
        ("Yes or No", None),
        ("yesterday", None),
        ("gold", None),
        ("", None),
    ],
)
def test_yes_and_no_in_answers(answer: str, label: str | None) -> None:
    asked = {"instruction": "Does it talk about price?", "output": "Yes"}
    assert headline_by_generation(asked, [answer]) == {
        "prediction": ["yes", label],
        "question": [asked["instruction"], asked["instruction"] if label == "yes" else None],
        "unparsable": float(label is None),
    }


def test_the_more_likely_of_yes_and_no() -> None:
    row = {"instruction": "Price?", "output": "No"}
    found = headline_by_likelihood(row, [(-1.0, True), (-2.0, False)])
    assert found == {"prediction": ["no", "yes"], "question": [None, "Price?"]}


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 1,234 apples", 1234), ("3 + 4 = 7.50.", 7.5), ("-2", -2), ("none", None)],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (b).", "B"),
        ("C", "C"),
        ("A or B", None),
        ("Answer is: A. Not B, the answer is D", "D"),
        ("no", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


def test_every_suite_is_complete() -> None:
    """Names are unique, every local reader exists, averages name metrics that there are."""
    tasks = [task for suite in all_suites().values() for task in suite.tasks]
    assert len({task.name for task in tasks}) == len(tasks)
    for task in tasks:
        assert task.source
        assert task.licence
        assert task.metrics
        if task.runner == "harness":
            assert task.harness
            assert task.reader in READERS
            assert task.files
    for suite in all_suites().values():
        metrics = {task.name: {metric.name for metric in task.metrics} for task in suite.tasks}
        for average in suite.averages:
            assert all(average.metric in metrics[name] for name in average.tasks)
    assert sum(len(task.metrics) for task in tasks) > 100
    assert len(chosen_tasks(["mmlu"])[0].harness) == 57


def test_unknown_names_come_with_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"--suite finence: no such suite. Did you mean 'fin"):
        chosen_suites(["finence"])
    with pytest.raises(ConfigError, match=r"--task fbp: no such task. Did you mean 'fpb'"):
        chosen_tasks(["fbp"])
    with pytest.raises(ConfigError, match=r"^evaluation.suites=maths: .*'math'"):
        chosen_suites(["maths"], "evaluation.suites=")


def test_local_files_become_rows(tmp_path: Path) -> None:
    prompt = "Instruction: What?\nInput: up 3 %\nAnswer: "
    (tmp_path / "fpb_test.jsonl").write_text(
        json.dumps({"context": prompt, "target": "positive"}) + "\n"
    )
    task = chosen_tasks(["fpb"])[0]
    settings = local_settings(task, "finance_fpb", tmp_path)
    rows = settings["custom_dataset"]()["test"].to_list()

    assert rows == [{"instruction": "What?", "input": "up 3 %", "answer": "positive"}]
    assert settings["test_split"] == "test"


def test_mmlu_files_have_test_and_dev(tmp_path: Path) -> None:
    for split in ("test", "dev"):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        line = f'"{split}, what?",a,b,c,d,C\n'
        (tmp_path / "mmlu" / split / f"anatomy_{split}.csv").write_text(line)
    task = replace(chosen_tasks(["mmlu_medical"])[0], harness=("mmlu_anatomy",))
    settings = local_settings(task, "mmlu_anatomy", tmp_path)

    assert settings["fewshot_split"] == "dev"
    assert settings["custom_dataset"]()["test"].to_list() == [
        {"question": "test, what?", "choices": ["a", "b", "c", "d"], "answer": 2}
    ]


def test_what_is_wrong_with_local_files(tmp_path: Path) -> None:
    task = chosen_tasks(["gsm8k"])[0]
    assert missing_files(task, tmp_path) == [tmp_path / "gsm8k_test.jsonl"]
    with pytest.raises(DataError, match=r"gsm8k_test.jsonl is missing; it holds openai/gsm8k"):
        local_settings(task, "gsm8k_cot", tmp_path)
    broken = tmp_path / "x.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"a": 1}\n{"a":'))
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(broken)


def test_files_of_every_task_are_looked_for(tmp_path: Path) -> None:
    """Of whatever runner: a suite leaves out what it lacks before it begins."""
    for name in ("fpb", "mmlu", "humaneval_fix", "mt_bench"):
        [task] = chosen_tasks([name])
        assert task.files
        assert missing_files(task, tmp_path), name


def test_shuffled_options_keep_the_right_one() -> None:
    for seed in range(20):
        found = shuffled_options(["yes", "no", "maybe"], 0, seed)
        assert found["options"][found["gold"]] == "yes"
    assert len({shuffled_options(["yes", "no"], 0, seed)["gold"] for seed in range(20)}) == 2


# A row of the hub's copy of DROP's development set: two annotators, one span each.
DROP_ROW = {
    "query_id": "q",
    "passage": "Schilens caught a pass of Russell.",
    "question": "Who scored?",
    "answer": {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": ["Schilens"]},
    "validated_answers": {
        "number": ["", ""],
        "date": [{"day": "", "month": "", "year": ""}] * 2,
        "spans": [["JaMarcus Russell"], ["Schilens", "Russell"]],
    },
}


@pytest.mark.parametrize(
    ("answer", "exact", "f1"),
    [("Schilens", 1.0, 1.0), ("JaMarcus Russell", 1.0, 1.0), ("Russell", 0.0, 0.67)],
)
def test_drop_takes_the_best_over_annotators(answer: str, exact: float, f1: float) -> None:
    """As Dua et al. score: each annotator's answer by itself, never all of them as one."""
    [row] = reading.drop(datasets.Dataset.from_list([DROP_ROW]))
    assert row["answers"] == [["Schilens"], ["JaMarcus Russell"], ["Schilens", "Russell"]]
    assert reading.drop_results(row, [answer]) == {"em": exact, "f1": f1}


def nwgi_file(root: Path, *targets: str) -> None:
    asked = "What is the sentiment? {strong negative/moderately negative/.../strong positive}"
    rows = [
        {"context": f"Instruction: {asked}\nInput: news {i}\nAnswer: ", "target": target}
        for i, target in enumerate(targets)
    ]
    (root / "nwgi_test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize("name", ["nwgi", "nwgi_generation"])
def test_seven_grades_of_local_rows_are_folded_into_three(name: str, tmp_path: Path) -> None:
    folded = {
        "strong negative": "negative",
        "Moderately Negative": "negative",
        "mildly negative": "neutral",
        "neutral": "neutral",
        "mildly positive": "neutral",
        "moderately positive": "positive",
        "strong positive": "positive",
        "negative": "negative",
    }
    nwgi_file(tmp_path, *folded)
    [task] = chosen_tasks([name])
    [loaded] = _load(task, RunOptions(data_root=tmp_path), {}).values()
    rows = list(loaded.eval_docs)
    assert [row["answer"] for row in rows] == list(folded.values())
    assert {row["instruction"] for row in rows} == {
        "What is the sentiment of this news? Please choose an answer from "
        "{negative/neutral/positive}."
    }


@pytest.mark.parametrize(
    ("name", "file", "row", "message"),
    [
        (
            "fpb",
            "fpb_test.jsonl",
            {"context": "Instruction: a\nInput: b\nAnswer: ", "target": "mildly positive"},
            r"fpb: row 1 of its data has the target 'mildly positive', expected one of neg",
        ),
        (
            "headline_generation",
            "headline_test.jsonl",
            {"instruction": "Price?", "input": "gold", "output": "maybe"},
            r"headline_generation: row 1 .* 'maybe', expected one of yes, no",
        ),
        (
            "aqua",
            "aqua_test.jsonl",
            {"question": "q", "options": ["A)1", "B)2"], "correct": "F", "rationale": ""},
            r"aqua: row 1 .* 'F', expected one of a, b, c, d, e",
        ),
        (
            "medqa",
            "medqa_test.jsonl",
            {"question": "q", "options": dict.fromkeys("ABCD", "x"), "answer_idx": "E"},
            r"medqa_test.jsonl: a row has answer_idx 'E'; give A, B, C or D",
        ),
    ],
)
def test_targets_outside_the_label_set_are_refused(
    name: str, file: str, row: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(json.dumps(row) + "\n")
    [task] = chosen_tasks([name])
    with pytest.raises(DataError, match=message):
        _load(task, RunOptions(data_root=tmp_path), {})


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), (" (C) Aspirin", "C"), ("The answer is D.", "D"), ("Aspirin", None), ("", None)],
)
@pytest.mark.parametrize(
    "row",
    [
        {"sent1": "Which?", **{f"ending{i}": f"o{i}" for i in range(4)}, "label": 1},
        {"question": "Which?", "opa": "o0", "opb": "o1", "opc": "o2", "opd": "o3", "cop": 1},
        {"question": "Which?", "op1": "o0", "op2": "o1", "op3": "o2", "op4": "o3", "cop": 2},
    ],
)
def test_letters_of_generated_answers(row: dict[str, object], answer: str, letter: str) -> None:
    """Of the three schemas of medical examinations, whose right answer counts from 0 or 1."""
    (found,) = reading.lettered(datasets.Dataset.from_list([row]))
    assert found == {"question": "Which?", "options": ["o0", "o1", "o2", "o3"], "gold": 1}
    assert reading.crass_question(found).startswith("Question: Which?\nA. o0\nB. o1\n")
    scored = reading.lettered_answer(found, [answer])
    assert scored == {"prediction": ["B", letter], "unparsable": float(letter is None)}


def test_decisions_of_generated_answers() -> None:
    for answer, decision in (("Yes, it", "yes"), ("maybe", "maybe"), ("yes or no", None)):
        scored = reading.pubmedqa_answer({"answer": "yes"}, [answer])
        assert scored == {"prediction": ["yes", decision], "unparsable": float(decision is None)}
