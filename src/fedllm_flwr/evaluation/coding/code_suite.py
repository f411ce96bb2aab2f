"""The runner of the suite ``code``: generates answers to problems and runs their tests."""

import importlib.util
from collections.abc import Sequence

from fedllm_flwr.errors import ConfigError, DataError, first_line
from fedllm_flwr.evaluation.coding.problems import KINDS, Problem
from fedllm_flwr.evaluation.sandbox.bubblewrap import (
    Limits,
    run_programs,
    why_refused,
)
from fedllm_flwr.evaluation.suites.catalogue import SuiteTask
from fedllm_flwr.evaluation.suites.local_data import Row, read_rows
from fedllm_flwr.evaluation.suites.options import RunOptions
from fedllm_flwr.evaluation.suites.samples import Sample, Samples
from fedllm_flwr.evaluation.suites.suite_model import TextModel
from fedllm_flwr.models.generation import Decoding

KS = (1, 10)
NOT_RUN = (
    "answers are written and saved but not run; --allow-code-execution runs them in a sandbox on "
    "this machine"
)


def check(options: RunOptions) -> None:
    """Check options, and that programs can be run here, before a model is loaded.

    Raises:
        ConfigError: names the option and the remedy.
    """
    options.code.check()
    if options.code.allow_code_execution and (reason := why_refused()):
        raise ConfigError(f"--allow-code-execution: {reason}.")


def run_code_task(task: SuiteTask, model: TextModel, options: RunOptions) -> Samples:
    """Generate a model's answers to the problems of a task and run them against their tests.

    Without permission to run programs, the samples contain the answers but no score.

    Raises:
        DataError: the data are missing or have another schema.
    """
    chosen = options.code
    problems, left_out = read_problems(task, options)
    bare = model.prompt == "raw"
    new_tokens = model.answer_room(int(task.settings["new_tokens"]))
    prompts = [
        model.render_fitting(problem.bare if bare else problem.asked, new_tokens)
        for problem in problems
    ]
    stop = problems[0].stop if bare else ()
    decoding = Decoding(new_tokens, chosen.heat, float(task.settings.get("top_p", 0.95)), stop)
    repeated = [prompt for prompt in prompts for _ in range(chosen.samples)]
    written = model.generate(repeated, decoding, strip=False)
    rows = [written[i : i + chosen.samples] for i in range(0, len(written), chosen.samples)]
    if chosen.allow_code_execution:
        samples = score(problems, rows, bare, Limits(**task.settings.get("limits", {})))
        remark = left_out
    else:
        samples = unscored(problems, rows)
        remark = "; ".join(filter(None, [left_out, NOT_RUN]))
    return Samples(samples, prompts[0], {"remark": remark})


def score(
    problems: Sequence[Problem],
    answers: Sequence[Sequence[str]],
    bare: bool,
    limits: Limits,
) -> list[Sample]:
    """Run every answer against its problem's tests.

    Raises:
        ConfigError: this machine cannot run programs.
    """
    programs = [
        [problem.bare_program(text) if bare else problem.program(text) for text in texts]
        for problem, texts in zip(problems, answers, strict=True)
    ]
    different = list(dict.fromkeys(program for row in programs for program in row))
    outcomes = dict(zip(different, run_programs(different, limits), strict=True))
    for outcome in outcomes.values():
        if outcome.status == "refused":
            raise ConfigError(f"--allow-code-execution: {outcome.message}.")
    samples = unscored(problems, answers)
    for sample, row in zip(samples, programs, strict=True):
        ended = [outcomes[program] for program in row]
        passed = sum(outcome.passed for outcome in ended)
        sample["outcomes"] = [{"status": o.status, "message": o.message} for o in ended]
        sample["programs"] = [program.source for program in row]
        for k in KS:
            if k <= len(row):
                sample[f"pass@{k}"] = pass_at_k(len(row), passed, k)
    return samples


def unscored(problems: Sequence[Problem], answers: Sequence[Sequence[str]]) -> list[Sample]:
    """Samples with the answers to each problem, without scores."""
    return [
        {"id": problem.id, "target": problem.target, "answers": list(texts)}
        for problem, texts in zip(problems, answers, strict=True)
    ]


def read_problems(task: SuiteTask, options: RunOptions) -> tuple[list[Problem], str]:
    """The problems of a task, and a remark about those whose library is not installed.

    Raises:
        DataError: the file is missing, the hub cannot be reached, or a row lacks a field.
    """
    rows = _rows(task, options)
    first, last = task.settings.get("ids", (None, None))
    shown = task.settings.get("shown", ())
    count = task.shots if options.shots is None else options.shots
    shots = [row for row in rows if row.get("task_id") in shown][:count]
    if first is not None:
        rows = [row for row in rows if first <= row["task_id"] <= last]
    # Each problem of DS-1000 needs its library.
    libraries = {row["metadata"]["library"] for row in rows if "library" in row.get("metadata", {})}
    absent = sorted(
        name
        for name in libraries
        if importlib.util.find_spec(_MODULES.get(name, name.lower())) is None
    )
    kept = [row for row in rows if row.get("metadata", {}).get("library") not in absent]
    missing = len(rows) - len(kept)
    left_out = f"{missing} problems left out: {', '.join(absent)} not installed" if missing else ""
    rows = [kept[place] for place in options.places(len(kept))]
    try:
        problems = [KINDS[task.settings["kind"]](row, shots) for row in rows]
    except KeyError as error:
        raise DataError(
            f"{task.name}: a row has no field {error}; it needs {task.source}."
        ) from None
    if not problems:
        raise DataError(f"{task.name}: no problem to solve. {left_out}")
    return problems, left_out


def _rows(task: SuiteTask, options: RunOptions) -> list[Row]:
    if options.data_root is not None:
        path = options.data_root / task.files[0]
        if not path.is_file():
            raise DataError(f"{task.name}: {path} is missing; it holds {task.source}.")
        return read_rows(path)
    import datasets

    hub, *name = task.settings["hub"]
    splits = task.settings["splits"]
    try:
        return [
            dict(row) for split in splits for row in datasets.load_dataset(hub, *name, split=split)
        ]
    except Exception as error:  # datasets and the hub raise many types
        raise DataError(
            f"{task.name}: {hub} cannot be loaded: {first_line(error)[:200]}; give local files "
            "with --data-root."
        ) from error


_MODULES = {"Pytorch": "torch", "Sklearn": "sklearn"}


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k answers passes its tests.

    With n >= k samples, c of which passed, it is 1 - C(n-c, k) / C(n, k), computed as one minus the
    product of 1 - k/i over n-c < i <= n, which cannot overflow (Chen et al. 2021, arXiv 2107.03374,
    equation 1).

    Raises:
        ValueError: k or c is out of range for n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_passed <= num_samples:
        raise ValueError(f"pass@{k} of {num_passed} passed among {num_samples} is not defined")
    none_passes = 1.0
    for i in range(num_samples - num_passed + 1, num_samples + 1):
        none_passes *= max(0.0, 1.0 - k / i)
    return 1.0 - none_passes
