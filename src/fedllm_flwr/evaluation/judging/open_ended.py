"""The open-ended suite: a model writes answers, a judge grades them; one sample per question."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.evaluation.judging.benchmarks import (
    BENCHMARKS,
    Benchmark,
    PerQuestion,
    rule_scores,
)
from fedllm_flwr.evaluation.judging.endpoint import Endpoint, EndpointJudge, OnProgress
from fedllm_flwr.evaluation.judging.prompts import JudgePrompts, load_prompts
from fedllm_flwr.evaluation.judging.questions import OpenQuestion
from fedllm_flwr.evaluation.judging.verdicts import judge_all
from fedllm_flwr.evaluation.judging.written_answers import (
    AnsweredQuestion,
    Writer,
    answer_all,
    render,
)
from fedllm_flwr.evaluation.suites.catalogue import SuiteTask, suites_dir
from fedllm_flwr.evaluation.suites.options import JudgeOptions, RunOptions
from fedllm_flwr.evaluation.suites.samples import Samples

if TYPE_CHECKING:
    from fedllm_flwr.evaluation.suites.suite_model import TextModel

FOLDER = "open_ended"  # folder name in the data root and among the suites
BY_REFERENCE = "alpaca_eval"
UNPARSABLE = "unparsable"
_POSITIVE = (
    *("judge_concurrency", "judge_timeout", "judge_attempts", "max_new_tokens", "answer_batch"),
)


def check(tasks: Sequence[SuiteTask], options: RunOptions) -> None:
    """Check the options before a model is loaded.

    Raises:
        FedLLMError: a number is out of range, a file or judge is missing or cannot be reached.
    """
    for name in _POSITIVE:
        if (value := getattr(options.judging, name)) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be > 0, got {value:g}.")
    for task in tasks:
        if lack := what_lacks(task.name, options):
            raise ConfigError(f"--task {task.name}: {lack}.")
        load_questions(task.name, options)
    if judge := _judge(options.judging):
        _prompts(options)
        judge.check()


def what_lacks(name: str, options: RunOptions) -> str | None:
    """The option that a task needs and that is missing; None if there is none."""
    if options.judging.judge_model is None and not BENCHMARKS[name].rules:
        return "it needs --judge-model <name at OPENAI_BASE_URL>"
    if name == BY_REFERENCE and options.judging.reference is None:
        return "it needs --reference <file of baseline answers>"
    return None


def usage_line(notes: Sequence[Mapping[str, Any]]) -> str:
    """Cost of judging over all models and tasks, including earlier calls."""

    def total(key: str) -> Any:
        return sum(item.get(key) or 0 for item in notes)

    parts = [
        f"{total('replies'):,} replies for {total('verdicts'):,} verdicts",
        f"{total('prompt_tokens'):,} + {total('completion_tokens'):,} tokens",
        f"cost {total('cost'):.2f}" if any("cost" in item for item in notes) else "",
        f"{total('without_verdict'):,} without a verdict",
        f"{total('declined'):,} declined" if total("declined") else "",
        f"{total('uncounted'):,} replies without token counts" if total("uncounted") else "",
    ]
    return f"judge {notes[0]['judge']}: {', '.join(part for part in parts if part)}"


def load_questions(name: str, options: RunOptions) -> list[OpenQuestion]:
    """The questions of a benchmark that the options choose.

    Raises:
        DataError: its files are missing or invalid.
    """
    if name == BY_REFERENCE:
        source = Path(str(options.judging.reference))
    elif options.data_root is None:
        raise DataError(
            f"task {name}: give the folder of its files, --data-root DIR (fedllm evaluate --list)."
        )
    else:
        source = options.data_root / FOLDER
    questions = BENCHMARKS[name].load(source)
    return [questions[place] for place in options.places(len(questions))]


def run_open_ended_task(task: SuiteTask, model: "TextModel", options: RunOptions) -> Samples:
    """Generate a model's answers to the questions of a benchmark, and have a judge grade them.

    Answers and verdicts are saved in ``options.work_dir`` as they arrive; an interrupted call is
    resumed from there.

    Raises:
        DataError: the benchmark's files are missing.
        JudgeError: the judge cannot be used.
    """
    if options.work_dir is None:
        raise ConfigError(f"task {task.name} needs a working directory: --output.")
    chosen = options.judging
    benchmark, questions = BENCHMARKS[task.name], load_questions(task.name, options)
    endpoint = chosen.writer_url and Endpoint(
        chosen.writer_url, chosen.judge_concurrency, chosen.judge_timeout, "--writer-url"
    )
    writer = Writer(model, chosen.max_new_tokens, endpoint or None)
    backend = "endpoint" if endpoint else "torch"
    answered = answer_all(
        questions,
        writer,
        options.work_dir / f"{task.name}.answers.jsonl",
        identity=[backend, model.prompt, model.template, writer.room],
        seed=options.seed,
        batch_size=chosen.answer_batch,
        progress=_counting(f"{task.name}: {{}} of {{}} answers"),
    )
    answers = [answer for item in answered for answer in item.answers]
    scores = rule_scores(benchmark, answered)
    notes: dict[str, Any] = {
        "prompts": len(answers),
        "cut": sum(answer.prompt_cut > 0 for answer in answers),
        "answer_tokens": sum(answer.num_tokens for answer in answers),
        "answers_at_limit": sum(not answer.ended for answer in answers),
    }
    if judge := _judge(chosen):
        more, about = _judged(benchmark, answered, judge, options, options.work_dir)
        scores, notes = scores | more, notes | about
    samples = [_sample(item, i, scores) for i, item in enumerate(answered)]
    first = render(model, [{"role": "user", "content": questions[0].turns[0]}])
    return Samples(samples, first, notes)


def _judge(options: JudgeOptions) -> EndpointJudge | None:
    """The judge of the options, if any.

    Raises:
        ConfigError: it is a directory, and no endpoint is given.
    """
    name = options.judge_model
    if name is None:
        return None
    is_path = name.startswith(("/", "./", "../", "~")) or Path(name).is_dir()
    if is_path and not os.environ.get("OPENAI_BASE_URL"):
        raise ConfigError(
            f"--judge-model {name}: a local judge must be served by an endpoint (vllm serve "
            f"{name}, or transformers serve); set OPENAI_BASE_URL to its address, and give its "
            "name there."
        )
    return EndpointJudge(
        concurrency=options.judge_concurrency,
        timeout_s=options.judge_timeout,
        model=name,
        stream=options.judge_stream,
    )


def _judged(
    benchmark: Benchmark,
    answered: Sequence[AnsweredQuestion],
    judge: EndpointJudge,
    options: RunOptions,
    work_dir: Path,
) -> tuple[dict[str, PerQuestion], dict[str, Any]]:
    """Scores from verdicts, and the cost of judging."""
    prompts = _prompts(options)
    per_question = [benchmark.cases(item, prompts) for item in answered]
    names = list(per_question[0])
    verdicts, usage = judge_all(
        [cases[name] for cases in per_question for name in names],
        judge,
        work_dir / f"{benchmark.name}.verdicts.jsonl",
        options.judging.judge_attempts,
        _counting(f"{benchmark.name}: {{}} of {{}} verdicts"),
    )
    numbers = np.array(verdicts, np.float64)  # NaN for None
    values = {name: numbers[i :: len(names)] for i, name in enumerate(names)}
    without = np.isnan(numbers.reshape(-1, len(names))).any(1)
    notes: dict[str, Any] = {
        "judge": judge.model,
        "judge_prompts": f"{prompts.source} {prompts.digest}",
        "verdicts": len(verdicts),
        "without_verdict": verdicts.count(None),
        **usage,
    }
    if price := options.judging.judge_price:
        notes["cost"] = usage["prompt_tokens"] * price[0] + usage["completion_tokens"] * price[1]
        notes["cost"] /= 1e6
    if judge.dropped:
        notes["judge_refused_parameters"] = sorted(judge.dropped)
    return benchmark.scores(values) | {UNPARSABLE: np.asarray(without, np.float64)}, notes


def _prompts(options: RunOptions) -> JudgePrompts:
    folder = None if options.data_root is None else options.data_root / FOLDER
    return load_prompts(suites_dir() / FOLDER / "prompts.yaml", folder)


def _sample(
    answered: AnsweredQuestion, index: int, scores: dict[str, PerQuestion]
) -> dict[str, Any]:
    """One question's sample; scores are None without a verdict."""
    numbers = {name: float(values[index]) for name, values in scores.items()}
    return {
        "id": answered.question.id,
        "category": answered.question.category,
        "question": list(answered.question.turns),
        "answer": list(answered.texts),
        **{name: None if np.isnan(value) else value for name, value in numbers.items()},
    }


def _counting(line: str) -> OnProgress:
    """A progress counter on one line of the terminal."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\r" if done < total else "\r\033[K"
            print(f"  {line.format(done, total)}", end=end, file=sys.stderr)

    return show
