"""Problems of the code benchmarks, created from the rows of their data sets.

The prompts follow the paper named in ``suite.yaml``: a bare prompt is code for a base model to
continue; with a training template, the same problem is posed as an instruction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedllm_flwr.data.records import Messages
from fedllm_flwr.evaluation.coding.source_code import code_of, complete_source
from fedllm_flwr.evaluation.sandbox.bubblewrap import Program
from fedllm_flwr.evaluation.suites.local_data import Row

_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # Chen et al. 2021, section 2.1
_TASK = "Complete this Python function. Answer with the whole function in one code block."


@dataclass(frozen=True)
class Problem:
    """One programming problem.

    Args:
        id: the same for every model.
        bare: turns for a base model to continue; the last one ends where its code begins.
        asked: turns for an instruction-tuned model.
        stop: stop strings, excluded from a bare answer.
        bare_program, program: make a program of the answer to `bare` or `asked`.
        target: the data set's reference solution, as an answer to `bare`.
    """

    id: str
    bare: Messages
    asked: Messages
    stop: tuple[str, ...]
    bare_program: Callable[[str], Program]
    program: Callable[[str], Program]
    target: str


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _function(
    row: Row, start: str, tests: str, question: Messages, target: str, bare: Messages | None = None
) -> Problem:
    """A problem to be solved by one function; `start` is the code before its body."""
    name = row["entry_point"]
    preamble = start[: start.rfind(f"\ndef {name}(") + 1]
    return Problem(
        id=str(row["task_id"]),
        bare=bare or _user(start),
        asked=question,
        stop=_STOP,
        bare_program=lambda answer: Program(start + answer, tests),
        program=lambda answer: Program(complete_source(answer, start, preamble, name), tests),
        target=target,
    )


def human_eval(row: Row, shots: Sequence[Row]) -> Problem:
    """HumanEval (Chen et al. 2021): {task_id, prompt, entry_point, canonical_solution, test}."""
    tests = f"{row['test']}\ncheck({row['entry_point']})"
    question = _user(f"{_TASK}\n\n```python\n{row['prompt'].rstrip()}\n```")
    return _function(row, row["prompt"], tests, question, row["canonical_solution"])


def human_eval_synthesize(row: Row, shots: Sequence[Row]) -> Problem:
    """HumanEvalSynthesize (Muennighoff et al. 2023): HumanEvalPack, prompted by ``instruction``."""
    question = _user(f"{row['instruction']}\n\n```python\n{row['prompt'].rstrip()}\n```")
    return _function(row, row["prompt"], row["test"], question, row["canonical_solution"])


def human_eval_fix(row: Row, shots: Sequence[Row]) -> Problem:
    """HumanEvalFix (Muennighoff et al. 2023): a faulty function and its tests, to be fixed."""
    start, task = row["declaration"], f"Fix bugs in {row['entry_point']}."
    shown = f"{start}{row['buggy_solution'].rstrip()}\n\n{row['test'].strip()}"
    question = _user(f"{task}\n\n```python\n{shown}\n```")
    bare = _user(f"{shown}\n\n# {task}\n{start}")
    return _function(row, start, row["test"], question, row["canonical_solution"], bare)


def mbpp(row: Row, shots: Sequence[Row]) -> Problem:
    """MBPP (Austin et al. 2021, arXiv 2108.07732, section 3.2), full or sanitized rows."""
    imports = [row.get("test_setup_code") or "", *row.get("test_imports", [])]
    tests = "\n".join([*imports, *row["test_list"]])

    def program(answer: str) -> Program:
        return Program(code_of(answer), tests)

    bare, asked = [], []
    for shot in shots:
        solution = shot["code"].replace("\r\n", "\n").strip()
        bare += _mbpp_bare(shot)
        bare += [{"role": "assistant", "content": f"{solution}\n[DONE]"}]
        asked += _user(_mbpp_task(shot))
        asked += [{"role": "assistant", "content": f"```python\n{solution}\n```"}]
    return Problem(
        id=f"MBPP/{row['task_id']}",
        bare=[*bare, *_mbpp_bare(row)],
        asked=[*asked, *_user(_mbpp_task(row))],
        stop=("[DONE]",),
        bare_program=program,
        program=program,
        target=row["code"].replace("\r\n", "\n"),
    )


def _mbpp_task(row: Row) -> str:
    text, tests = row.get("text") or row["prompt"], "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {text} "
        f"Your code should pass these tests:\n\n{tests}"
    )


def _mbpp_bare(row: Row) -> Messages:
    return _user(f"{_mbpp_task(row)}\n[BEGIN]\n")


def ds_1000(row: Row, shots: Sequence[Row]) -> Problem:
    """DS-1000 (Lai et al. 2022): {prompt, code_context, reference_code, metadata}.

    ``code_context`` defines ``test_execution(code)``, and ``test_string(code)`` for some problems.
    """
    context = row["code_context"]
    calls = [name for name in ("test_execution", "test_string") if f"def {name}(" in context]

    def program(answer: str) -> Program:
        lines = [context, f"solution = {code_of(answer)!r}", *(f"{c}(solution)" for c in calls)]
        return Program("", "\n".join(lines))

    return Problem(
        id=f"DS-1000/{row['metadata']['problem_id']}",
        bare=_user(row["prompt"]),
        asked=_user(f"{row['prompt'].rstrip()}\n\nAnswer with the missing code in one code block."),
        stop=("</code>", "# SOLUTION END", "\nEND SOLUTION"),
        bare_program=program,
        program=program,
        target=row["reference_code"],
    )


KINDS: dict[str, Callable[[Row, Sequence[Row]], Problem]] = {
    "human_eval": human_eval,
    "human_eval_fix": human_eval_fix,
    "human_eval_synthesize": human_eval_synthesize,
    "mbpp": mbpp,
    "ds_1000": ds_1000,
}
