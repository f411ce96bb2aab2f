"""Code in answers, and the programs that problems make of them."""

import pytest

from fedllm_flwr.evaluation.coding.problems import (
    ds_1000,
    human_eval,
    human_eval_fix,
    human_eval_synthesize,
    mbpp,
)
from fedllm_flwr.evaluation.coding.source_code import code_of, complete_source
from fedllm_flwr.evaluation.sandbox.bubblewrap import run_programs, why_refused

START = 'import math\n\n\ndef area(r):\n    """Area of a circle."""\n'
WHOLE = "def area(r):\n    return math.pi * r * r\n"
BODY = "    return math.pi * r * r\n"
runs = pytest.mark.skipif(why_refused() is not None, reason=str(why_refused()))


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Sure:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1", "x = 1"),
        ("```python\r\nx = 1\r\n```", "x = 1\r\n"),
        ("```\ny = 2\n```\nbetter\n```python\ndef f():\n    pass\n```", "def f():\n    pass\n"),
        ("[BEGIN]\nx = 1\n[DONE] and more", "\nx = 1\n"),
        ("x = 1", "x = 1"),
        ("", ""),
    ],
)
def test_code_of_an_answer(answer: str, code: str) -> None:
    assert code_of(answer, "f") == code


@pytest.mark.parametrize(
    "answer",
    [
        WHOLE,
        BODY,
        "return math.pi * r * r",
        f"Here it is:\n```python\n{WHOLE}```",
        f"```python\n{START}{BODY}```",
        "```python\n    def area(r):\n        return math.pi * r * r\n```",
        "if r < 0:\n    raise ValueError\nreturn math.pi * r * r",
    ],
)
def test_whole_functions_and_bodies_become_programs(answer: str) -> None:
    names: dict[str, object] = {}
    exec(complete_source(answer, START, "import math\n", "area"), names)

    assert names["area"](2) == pytest.approx(12.566370614)  # type: ignore[operator]


HUMAN_EVAL = {
    "task_id": "HumanEval/900",
    "prompt": START,
    "entry_point": "area",
    "canonical_solution": BODY,
    "test": "def check(candidate):\n    assert abs(candidate(1) - math.pi) < 1e-9\n",
}
PACK = {
    **HUMAN_EVAL,
    "task_id": "Python/900",
    "declaration": "import math\n\n\ndef area(r):\n",
    "buggy_solution": "    return math.pi * r\n",
    "instruction": "Write a Python function `area(r)`: area of a circle.",
    "test": "def check(area):\n    assert abs(area(2) - 4 * math.pi) < 1e-9\n\ncheck(area)",
}
MBPP = {
    "task_id": 900,
    "text": "Write a function to double a number.",
    "code": "def twice(x):\r\n    return 2 * x",
    "test_list": ["assert twice(2) == 4", "assert twice(math.inf) == math.inf"],
    "test_setup_code": "import math",
}
DS_1000 = {
    "prompt": "Double the array `a` into `result`.\nBEGIN SOLUTION\n<code>\n",
    "code_context": (
        "import numpy as np\n\ndef test_execution(solution):\n    names = {'a': np.arange(3)}\n"
        "    exec(solution, names)\n    assert list(names['result']) == [0, 2, 4]\n\n"
        "def test_string(solution):\n    assert 'for' not in solution\n"
    ),
    "reference_code": "result = 2 * a",
    "metadata": {"problem_id": 3, "library": "Numpy"},
}


@runs
@pytest.mark.parametrize(
    ("problem", "wrong"),
    [
        (human_eval(HUMAN_EVAL, ()), "    return 3 * r * r\n"),
        (human_eval_fix(PACK, ()), PACK["buggy_solution"]),
        (human_eval_synthesize(PACK, ()), "    return 0\n"),
        (mbpp(MBPP, ()), "def twice(x):\n    return x + 2 if x < 3 else 0"),
        (ds_1000(DS_1000, ()), "result = [2 * x for x in a]"),
    ],
    ids=lambda value: getattr(value, "id", ""),
)
def test_solutions_pass_and_wrong_ones_fail(problem, wrong) -> None:  # type: ignore[no-untyped-def]
    right = [problem.bare_program(problem.target), problem.program(f"```\n{problem.target}```")]
    outcomes = run_programs([*right, problem.bare_program(wrong), problem.program(wrong)])

    assert [outcome.status for outcome in outcomes] == ["passed", "passed", "failed", "failed"]
    assert "AssertionError" in outcomes[2].message


def test_shots_come_before_the_question() -> None:
    shot = {**MBPP, "task_id": 2, "text": "Write a function to halve.", "code": "half = 1"}
    problem = mbpp(MBPP, [shot])

    assert [turn["role"] for turn in problem.asked] == ["user", "assistant", "user"]
    assert "halve" in problem.asked[0]["content"]
    assert problem.asked[1]["content"] == "```python\nhalf = 1\n```"
    assert problem.bare[1]["content"] == "half = 1\n[DONE]"
    assert problem.bare[2]["content"].endswith("assert twice(math.inf) == math.inf\n[BEGIN]\n")


def test_a_solution_is_not_shown() -> None:
    for problem in (human_eval(HUMAN_EVAL, ()), human_eval_synthesize(PACK, ()), mbpp(MBPP, ())):
        shown = str([problem.bare, problem.asked])
        assert "math.pi * r * r" not in shown
        assert "2 * x" not in shown
