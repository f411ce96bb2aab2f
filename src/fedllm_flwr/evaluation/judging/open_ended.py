"""The open-ended suite: a model answers, a judge grades, one sample per question."""

import hashlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.evaluation.judging.benchmarks import BENCHMARKS, Benchmark, Values, rule_scores
from fedllm_flwr.evaluation.judging.endpoint import Endpoint, EndpointJudge
from fedllm_flwr.evaluation.judging.prompts import JudgePrompts, load_prompts
from fedllm_flwr.evaluation.judging.questions import OpenQuestion
from fedllm_flwr.evaluation.judging.verdicts import judge_all
from fedllm_flwr.evaluation.judging.written_answers import (
    AnsweredQuestion,
    EndpointWriter,
    ModelWriter,
    Writer,
    answer_all,
    render,
)
from fedllm_flwr.evaluation.suites.catalogue import SuiteTask, suites_dir
from fedllm_flwr.evaluation.suites.samples import RunOptions, Samples

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


@dataclass(frozen=True)
class JudgeOptions:
    """Options of writing and grading answers.

    Args:
        model: name at the endpoint; None: no judge, scores by rule only.
        concurrency: requests to an endpoint at once.
        attempts: how often a judge is asked for a verdict in all.
        price: in some currency per million prompt and completion tokens.
        reference: file of answers to be better than.
        writer_url: endpoint that writes the answers; None: the model in this process does.
    """

    model: str | None = None
    concurrency: int = 4
    timeout_s: float = 120.0
    attempts: int = 3
    stream: bool = False
    price: tuple[float, float] | None = None
    reference: str | None = None
    reference_digest: str = ""
    writer_url: str | None = None
    max_new_tokens: int = 1024
    batch_size: int = 16

    def as_extra(self) -> dict[str, Any]:
        """As a value of ``RunOptions.extra``.

        Raises:
            DataError: the reference file cannot be read.
        """
        digest = ""
        if self.reference is not None:
            try:
                content = Path(self.reference).expanduser().read_bytes()
            except OSError as error:
                raise DataError(f"--reference {self.reference}: {error.strerror}.") from error
            digest = hashlib.sha256(content).hexdigest()
        return asdict(replace(self, reference_digest=digest))

    @classmethod
    def of(cls, options: RunOptions) -> "JudgeOptions":
        """From ``RunOptions.extra``; other runners' options are passed over."""
        known = {name: options.extra[name] for name in asdict(cls()) if name in options.extra}
        return cls(**known)

    def make_judge(self) -> EndpointJudge | None:
        """The judge of `model`.

        Raises:
            ConfigError: it is a directory, and nobody serves it.
        """
        if self.model is None:
            return None
        is_path = self.model.startswith(("/", "./", "../", "~")) or Path(self.model).is_dir()
        if is_path and not os.environ.get("OPENAI_BASE_URL"):
            raise ConfigError(
                f"--judge-model {self.model}: a local judge is an endpoint too; serve it (vllm "
                f"serve {self.model}, or transformers serve), set OPENAI_BASE_URL to where it is, "
                "and give its name there."
            )
        return EndpointJudge(
            concurrency=self.concurrency,
            timeout_s=self.timeout_s,
            model=self.model,
            stream=self.stream,
        )

    def make_writer(self, model: "TextModel") -> Writer:
        """Writer of a model's answers."""
        if self.writer_url is None:
            return ModelWriter(model, self.max_new_tokens)
        endpoint = Endpoint(self.writer_url, self.concurrency, self.timeout_s, "--writer-url")
        return EndpointWriter(model, self.max_new_tokens, endpoint)


def check(tasks: Sequence[SuiteTask], options: RunOptions) -> None:
    """Refuse what cannot work, before a model is loaded.

    Raises:
        FedLLMError: a number out of range, a missing judge or file, a judge that does not answer.
    """
    chosen = JudgeOptions.of(options)
    for name, option in _POSITIVE.items():
        if getattr(chosen, name) <= 0:
            raise ConfigError(f"{option} must be > 0, got {getattr(chosen, name):g}.")
    for task in tasks:
        if lack := what_lacks(task.name, options):
            raise ConfigError(f"--task {task.name}: {lack}.")
        load_questions(task.name, options)
    judge = chosen.make_judge()
    if judge is not None:
        _prompts(options)
        judge.check()


def what_lacks(name: str, options: RunOptions) -> str | None:
    """Option that a task still needs; None if there is none."""
    chosen = JudgeOptions.of(options)
    if chosen.model is None and not BENCHMARKS[name].rules:
        return "it needs --judge-model <name at OPENAI_BASE_URL>"
    if name == BY_REFERENCE and chosen.reference is None:
        return "it needs --reference <file of answers to be better than>"
    return None


def usage_line(notes: Sequence[Mapping[str, Any]]) -> str:
    """Cost of judging over all models and tasks, earlier calls included."""

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


def run_open_ended_task(task: SuiteTask, model: "TextModel", options: RunOptions) -> Samples:
    """Let a model answer the questions of a set, and have a judge grade them.

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
    backend = "torch" if chosen.writer_url is None else "endpoint"
    room = model.answer_room(chosen.max_new_tokens)
    answered = answer_all(
        questions,
        chosen.make_writer(model),
        options.work_dir / f"{task.name}.answers.jsonl",
        identity=[backend, model.prompt, model.template, room],
        seed=options.seed,
        batch_size=chosen.batch_size,
        progress=_Progress(task.name, "answers"),
    )
    scores, answers = (
        dict(rule_scores(benchmark, answered)),
        [a for x in answered for a in x.answers],
    )
    notes: dict[str, Any] = {
        "prompts": len(answers),
        "cut": sum(answer.prompt_cut > 0 for answer in answers),
        "answer_tokens": sum(answer.num_tokens for answer in answers),
        "answers_at_limit": sum(not answer.ended for answer in answers),
    }
    if chosen.model is not None:
        more, about = _judged(benchmark, answered, chosen, options, options.work_dir)
        scores, notes = scores | more, notes | about
    samples = [_sample(item, i, scores) for i, item in enumerate(answered)]
    first = render(model, [{"role": "user", "content": questions[0].turns[0]}])
    return Samples(samples, first, notes, time.monotonic() - started)


def _judged(
    benchmark: Benchmark,
    answered: Sequence[AnsweredQuestion],
    chosen: JudgeOptions,
    options: RunOptions,
    work_dir: Path,
) -> tuple[dict[str, Values], dict[str, Any]]:
    """Scores from verdicts, and what judging took."""
    judge = chosen.make_judge()
    assert judge is not None
    prompts = _prompts(options)
    per_question = [benchmark.cases(item, prompts) for item in answered]
    names = list(per_question[0])
    verdicts, usage = judge_all(
        [cases[name] for cases in per_question for name in names],
        judge,
        work_dir / f"{benchmark.name}.verdicts.jsonl",
        chosen.attempts,
        _Progress(benchmark.name, "verdicts"),
    )
    numbers = np.array([np.nan if v.value is None else v.value for v in verdicts])
    values = {name: numbers[i :: len(names)] for i, name in enumerate(names)}
    missing: Values = np.isnan(np.stack(list(values.values()))).any(0).astype(np.float64)
    notes = {
        "judge": judge.model,
        "judge_prompts": f"{prompts.source} {prompts.digest}",
        "verdicts": len(verdicts),
        "without_verdict": sum(verdict.value is None for verdict in verdicts),
        **asdict(usage),
    }
    if chosen.price is not None:
        notes["cost"] = usage.cost(chosen.price)
    if judge.dropped:
        notes["judge_refused_parameters"] = sorted(judge.dropped)
    return benchmark.scores(values) | {UNPARSABLE: missing}, notes


def _prompts(options: RunOptions) -> JudgePrompts:
    folder = None if options.data_root is None else options.data_root / FOLDER
    return load_prompts(suites_dir() / FOLDER / "prompts.yaml", folder)


def _sample(answered: AnsweredQuestion, index: int, scores: dict[str, Values]) -> dict[str, Any]:
    """One question: None where there is no verdict."""
    numbers = {name: float(values[index]) for name, values in scores.items()}
    return {
        "id": answered.question.id,
        "category": answered.question.category,
        "question": list(answered.question.turns),
        "answer": list(answered.texts),
        **{name: None if np.isnan(value) else value for name, value in numbers.items()},
    }


@dataclass(frozen=True)
class _Progress:
    """A line on a terminal that counts up."""

    task: str
    what: str

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\r" if done < total else "\r\033[K"
            print(f"  {self.task}: {done} of {total} {self.what}", end=end, file=sys.stderr)
