"""The open-ended suite: a model answers, a judge grades, a sample per question comes out."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.evaluation.judging.answers import Answered, answer_all
from fedllm_flwr.evaluation.judging.benchmarks import BENCHMARKS, Benchmark, Values, rule_scores
from fedllm_flwr.evaluation.judging.endpoint import EndpointJudge
from fedllm_flwr.evaluation.judging.judge import Judge
from fedllm_flwr.evaluation.judging.options import JudgeOptions
from fedllm_flwr.evaluation.judging.panel import Usage, Verdict, judge_all
from fedllm_flwr.evaluation.judging.prompts import JudgePrompts, load_prompts
from fedllm_flwr.evaluation.judging.questions import Question
from fedllm_flwr.evaluation.judging.trained import render, writer_for
from fedllm_flwr.evaluation.judging.writing import require_vllm
from fedllm_flwr.evaluation.suites.catalogue import SuiteTask, suites_dir
from fedllm_flwr.evaluation.suites.results import RunOptions, Samples

if TYPE_CHECKING:
    from fedllm_flwr.evaluation.suites.suite_model import TextModel

FOLDER = "open_ended"  # below the data root, and below the suites
BY_REFERENCE = "alpaca_eval"
UNPARSABLE = "unparsable"
_POSITIVE = {
    "concurrency": "--judge-concurrency",
    "timeout_s": "--judge-timeout",
    "attempts": "--judge-attempts",
    "max_new_tokens": "--max-new-tokens",
    "batch_size": "--answer-batch",
}


def check(tasks: Sequence[SuiteTask], options: RunOptions) -> None:
    """Refuse what cannot work, before a model is loaded.

    Raises:
        FedLLMError: a number out of range, a missing judge or file, a judge that does not answer.
    """
    chosen = JudgeOptions.of(options)
    for name, option in _POSITIVE.items():
        if getattr(chosen, name) <= 0:
            raise ConfigError(f"{option} must be > 0, got {getattr(chosen, name):g}.")
    if chosen.backend == "vllm":
        require_vllm()
    for task in tasks:
        if lack := what_lacks(task.name, options):
            raise ConfigError(f"--task {task.name}: {lack}.")
        load_questions(task.name, options)
    judge = chosen.make_judge()
    if judge is not None:
        _prompts(options)
        judge.check()


def what_lacks(name: str, options: RunOptions) -> str | None:
    """What a task needs besides, and how it is given; None if nothing."""
    chosen = JudgeOptions.of(options)
    if chosen.model is None and not BENCHMARKS[name].rules:
        return "it needs --judge-model <name at OPENAI_BASE_URL, or directory>"
    if name == BY_REFERENCE and chosen.reference is None:
        return "it needs --reference <file of answers to be better than>"
    return None


def usage_line(notes: Sequence[Mapping[str, Any]]) -> str:
    """What judging took over all models and tasks, those of earlier calls included."""

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


def load_questions(name: str, options: RunOptions) -> list[Question]:
    """The first questions of a set.

    Raises:
        DataError: its files are missing or broken.
    """
    if name == BY_REFERENCE:
        source = Path(str(JudgeOptions.of(options).reference)).expanduser()
    elif options.data_root is None:
        raise DataError(
            f"task {name}: give the folder of its files, --data-root DIR (fedllm evaluate --list)."
        )
    else:
        source = options.data_root / FOLDER
    return BENCHMARKS[name].load(source)[: options.limit]


class OpenEnded:
    """Scores models one after another; one judge for all."""

    def __init__(self) -> None:
        self._judge: Judge | None = None
        self._judged_by: JudgeOptions | None = None
        self._writers: dict[str, Any] = {}  # vLLM's engine stays from model to model

    def run(self, task: SuiteTask, model: "TextModel", options: RunOptions) -> Samples:
        """Score a model on a set.

        Answers and verdicts are kept in ``options.work_dir`` as they come; a call that follows one
        that was stopped goes on there.

        Raises:
            DataError: the set's files are missing.
            JudgeError: the judge cannot be asked.
        """
        started = time.monotonic()
        if options.work_dir is None:
            raise ConfigError(f"task {task.name} needs a directory to work in: --output.")
        chosen = JudgeOptions.of(options)
        benchmark, questions = BENCHMARKS[task.name], load_questions(task.name, options)
        writer = writer_for(model, chosen.backend, chosen.max_new_tokens, self._writers)
        answered = answer_all(
            questions,
            writer,
            options.work_dir / f"{task.name}.answers.jsonl",
            identity=[chosen.backend, model.prompt, model.template, writer.max_new_tokens],
            seed=options.seed,
            batch_size=chosen.batch_size,
            progress=_Progress(task.name, "answers"),
        )
        scores, notes = dict(rule_scores(benchmark, answered)), _answer_notes(answered)
        if chosen.model is not None:
            more, about = self._judged(benchmark, answered, chosen, options)
            scores, notes = scores | more, notes | about
        samples = [_sample(item, i, scores) for i, item in enumerate(answered)]
        first = render(model, [{"role": "user", "content": questions[0].turns[0]}])
        return Samples(samples, first, notes, time.monotonic() - started)

    def _judged(
        self,
        benchmark: Benchmark,
        answered: Sequence[Answered],
        chosen: JudgeOptions,
        options: RunOptions,
    ) -> tuple[dict[str, Values], dict[str, Any]]:
        """Scores from verdicts, and what judging took."""
        assert options.work_dir is not None
        if self._judged_by != chosen:
            self._judge, self._judged_by = chosen.make_judge(), chosen
        assert self._judge is not None
        prompts = _prompts(options)
        per_question = [benchmark.cases(item, prompts) for item in answered]
        names = list(per_question[0])
        verdicts, usage = judge_all(
            [cases[name] for cases in per_question for name in names],
            self._judge,
            options.work_dir / f"{benchmark.name}.verdicts.jsonl",
            chosen.attempts,
            _Progress(benchmark.name, "verdicts"),
        )
        columns = [verdicts[i :: len(names)] for i in range(len(names))]
        values = {name: _values(some) for name, some in zip(names, columns, strict=True)}
        unclear = np.isnan(np.stack(list(values.values()))).any(0)
        missing: Values = np.asarray(unclear, np.float64)
        scores = benchmark.scores(values) | {UNPARSABLE: missing}
        return scores, _judge_notes(self._judge, prompts, usage, verdicts, chosen)


def _prompts(options: RunOptions) -> JudgePrompts:
    folder = None if options.data_root is None else options.data_root / FOLDER
    return load_prompts(suites_dir() / FOLDER / "prompts.yaml", folder)


def _values(verdicts: Sequence[Verdict]) -> Values:
    return np.array([np.nan if v.value is None else v.value for v in verdicts])


def _sample(answered: Answered, index: int, scores: dict[str, Values]) -> dict[str, Any]:
    """One question: None where there is no verdict."""
    numbers = {name: float(values[index]) for name, values in scores.items()}
    return {
        "id": answered.question.id,
        "category": answered.question.category,
        "question": list(answered.question.turns),
        "answer": list(answered.texts),
        **{name: None if np.isnan(value) else value for name, value in numbers.items()},
    }


def _answer_notes(answered: Sequence[Answered]) -> dict[str, Any]:
    answers = [answer for item in answered for answer in item.answers]
    return {
        "prompts": len(answers),
        "cut": sum(answer.prompt_cut > 0 for answer in answers),
        "answer_tokens": sum(answer.num_tokens for answer in answers),
        "answers_at_limit": sum(not answer.ended for answer in answers),
    }


def _judge_notes(
    judge: Judge,
    prompts: JudgePrompts,
    usage: Usage,
    verdicts: Sequence[Verdict],
    chosen: JudgeOptions,
) -> dict[str, Any]:
    notes = {
        "judge": judge.name,
        "judge_prompts": f"{prompts.source} {prompts.digest}",
        "verdicts": len(verdicts),
        "without_verdict": sum(verdict.value is None for verdict in verdicts),
        **asdict(usage),
    }
    if chosen.price is not None:
        notes["cost"] = usage.cost(chosen.price)
    if isinstance(judge, EndpointJudge) and judge.dropped:
        notes["judge_refused_parameters"] = sorted(judge.dropped)
    return notes


@dataclass(frozen=True)
class _Progress:
    """A line on a terminal that counts up."""

    task: str
    what: str

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\r" if done < total else "\r\033[K"
            print(f"  {self.task}: {done} of {total} {self.what}", end=end, file=sys.stderr)
