"""The runner of the code suite: options, data, scores."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.evaluation.coding.code_suite import read_problems, score, unscored
from fedllm_flwr.evaluation.coding.problems import human_eval
from fedllm_flwr.evaluation.sandbox.bubblewrap import Limits, why_refused
from fedllm_flwr.evaluation.suites.catalogue import all_suites
from fedllm_flwr.evaluation.suites.options import CodeOptions, RunOptions
from fedllm_flwr.evaluation.suites.scores import task_estimates

TASKS = {task.name: task for task in all_suites()["code"].tasks}
DOUBLE = {
    "task_id": "HumanEval/900",
    "prompt": "def twice(x):\n",
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(f):\n    assert f(3) == 6\n",
}
RIGHT, WRONG = "    return x + x", "    return x"


@pytest.mark.skipif(why_refused() is not None, reason=str(why_refused()))
def test_scores_of_samples() -> None:
    """4 of 12 answers pass: pass@1 is 1/3, pass@10 is 1 (8 fail, so 10 always hold one)."""
    problems = [human_eval(DOUBLE, ()), human_eval({**DOUBLE, "task_id": "HumanEval/901"}, ())]
    answers = [[RIGHT] * 4 + [WRONG] * 8, [WRONG] * 12]
    samples = score(problems, answers, bare=True, limits=Limits())

    assert [sample["pass@1"] for sample in samples] == pytest.approx([1 / 3, 0])
    assert [sample["pass@10"] for sample in samples] == pytest.approx([1, 0])
    assert [outcome["status"] for outcome in samples[0]["outcomes"]] == ["passed"] * 4 + [
        "failed"
    ] * 8
    assert samples[0]["programs"][0] == "def twice(x):\n    return x + x"
    estimates = task_estimates(TASKS["humaneval"], samples)
    assert estimates["pass@1"].value == pytest.approx(1 / 6)
    assert estimates["pass@10"].value == pytest.approx(1 / 2)


@pytest.mark.skipif(why_refused() is not None, reason=str(why_refused()))
def test_one_answer_gives_no_pass_at_10() -> None:
    samples = score([human_eval(DOUBLE, ())], [[RIGHT]], bare=True, limits=Limits())

    assert samples[0]["pass@1"] == 1.0
    assert "pass@10" not in samples[0]


def test_what_was_not_run_has_no_score() -> None:
    samples = unscored([human_eval(DOUBLE, ())], [[RIGHT]])

    assert samples == [{"id": "HumanEval/900", "target": "    return 2 * x\n", "answers": [RIGHT]}]
    assert task_estimates(TASKS["humaneval"], samples) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "--samples must be > 0, got 0."),
        ({"samples": 5, "temperature": 0.0}, "--temperature 0 gives the same answer 5 times"),
        ({"temperature": -1.0}, "--temperature must be >= 0, got -1."),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CodeOptions(**options).check()

    assert str(caught.value).startswith(message)


def test_sampling_is_hot_only_for_several_answers() -> None:
    assert CodeOptions().heat == 0.0
    assert CodeOptions(samples=20).heat == 0.8
    assert CodeOptions(samples=20, temperature=0.2).heat == 0.2


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_mbpp_takes_the_ids_of_the_paper(tmp_path: Path) -> None:
    rows = [
        {"task_id": i, "text": f"Task {i}.", "code": f"x = {i}", "test_list": [f"assert x == {i}"]}
        for i in (1, 2, 3, 4, 10, 11, 510, 511)
    ]
    write(tmp_path / "mbpp.jsonl", rows)
    problems, _ = read_problems(TASKS["mbpp"], RunOptions(data_root=tmp_path))
    fewer, _ = read_problems(TASKS["mbpp"], RunOptions(data_root=tmp_path, limit=1, shots=1))

    assert [problem.id for problem in problems] == ["MBPP/11", "MBPP/510"]
    assert [turn["content"] for turn in problems[0].bare if turn["role"] == "assistant"] == [
        "x = 2\n[DONE]",
        "x = 3\n[DONE]",
        "x = 4\n[DONE]",
    ]
    assert [(problem.id, len(problem.asked)) for problem in fewer] == [("MBPP/11", 3)]


def test_problems_of_absent_libraries_are_left_out(tmp_path: Path) -> None:
    row = {"prompt": "", "code_context": "", "reference_code": ""}
    libraries = ["Numpy", "Nosuchlibrary", "Sklearn"]
    rows = [
        {**row, "metadata": {"problem_id": i, "library": library}}
        for i, library in enumerate(libraries)
    ]
    with gzip.open(tmp_path / "ds1000.jsonl.gz", "wt") as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in rows))
    problems, remark = read_problems(TASKS["ds1000"], RunOptions(data_root=tmp_path))

    assert [problem.id for problem in problems] == ["DS-1000/0", "DS-1000/2"]
    assert remark == "1 problems left out: Nosuchlibrary not installed"


def test_a_missing_file_and_a_missing_field_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"HumanEval\.jsonl\.gz is missing"):
        read_problems(TASKS["humaneval"], RunOptions(data_root=tmp_path))
    write(tmp_path / "mbpp.jsonl", [{"task_id": 11, "text": "x", "code": "y"}])
    with pytest.raises(DataError, match="a row has no field 'test_list'"):
        read_problems(TASKS["mbpp"], RunOptions(data_root=tmp_path))
