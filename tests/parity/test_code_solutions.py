"""The data sets' own solutions pass all of their tests, and spoiled ones do not."""

import ast
import gzip
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedllm_flwr.evaluation.coding.problems import Problem, human_eval, mbpp
from fedllm_flwr.evaluation.sandbox.bubblewrap import Program, run_programs, why_refused

SHARED = Path(os.environ.get("FEDLLM_DATA", Path(__file__).parents[3] / "shared/data"))
DATA = SHARED / "eval"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark data in {DATA}"),
    pytest.mark.skipif(why_refused() is not None, reason=str(why_refused())),
]


def human_eval_problems() -> list[Problem]:
    with gzip.open(DATA / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        return [human_eval(json.loads(line), ()) for line in file]


def mbpp_problems() -> list[Problem]:
    lines = (DATA / "mbpp.jsonl").read_text("utf-8").splitlines()
    return [mbpp(json.loads(line), ()) for line in lines]


def sanitized_problems() -> list[Problem]:
    return [mbpp(row, ()) for row in json.loads((DATA / "sanitized-mbpp.json").read_text("utf-8"))]


def not_passed(problems: Sequence[Problem], programs: Sequence[Program]) -> list[tuple[str, str]]:
    outcomes = run_programs(programs)
    return [
        (problem.id, f"{outcome.status}: {outcome.message}")
        for problem, outcome in zip(problems, outcomes, strict=True)
        if not outcome.passed
    ]


@pytest.mark.parametrize(
    ("read", "count"),
    [(human_eval_problems, 164), (mbpp_problems, 974), (sanitized_problems, 427)],
)
def test_all_solutions_pass(read, count) -> None:  # type: ignore[no-untyped-def]
    problems = read()

    assert len(problems) == count
    assert not_passed(problems, [item.bare_program(item.target) for item in problems]) == []


def test_solutions_pass_as_answers_of_a_tuned_model() -> None:
    problems = human_eval_problems()
    answers = [f"Here:\n```python\n{item.bare[0]['content']}{item.target}```" for item in problems]
    programs = [item.program(text) for item, text in zip(problems, answers, strict=True)]

    assert not_passed(problems, programs) == []


class _NothingReturned(ast.NodeTransformer):
    """Every returned value becomes an object that equals nothing."""

    def visit_Return(self, node: ast.Return) -> ast.Return:
        return ast.Return(ast.Call(ast.Name("object", ast.Load()), [], []))


@pytest.mark.parametrize("read", [human_eval_problems, sanitized_problems])
def test_spoiled_solutions_fail(read) -> None:  # type: ignore[no-untyped-def]
    problems = read()
    programs = []
    for problem in problems:
        right = problem.bare_program(problem.target)
        spoiled = ast.fix_missing_locations(_NothingReturned().visit(ast.parse(right.source)))
        programs.append(Program(ast.unparse(spoiled), right.tests))
    outcomes = run_programs(programs)

    passed = [p.id for p, outcome in zip(problems, outcomes, strict=True) if outcome.passed]
    assert passed == []
    assert set(Counter(outcome.status for outcome in outcomes)) <= {"failed", "timeout"}
