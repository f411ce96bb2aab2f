"""The open-ended benchmarks: their questions, judge requests and scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.evaluation.judging import questions
from fedllm_flwr.evaluation.judging.prompts import JudgePrompts
from fedllm_flwr.evaluation.judging.questions import OpenQuestion
from fedllm_flwr.evaluation.judging.refusals import refuses_advbench, refuses_openfedllm
from fedllm_flwr.evaluation.judging.verdicts import Case, Scale
from fedllm_flwr.evaluation.judging.written_answers import AnsweredQuestion

PerQuestion = NDArray[np.float64]  # (questions,): NaN without a verdict
Cases = dict[str, Case]  # by their role for the question: turn_1, turn_2, ...


@dataclass(frozen=True)
class Benchmark:
    """One open-ended benchmark.

    ``cases`` makes the judge's cases of an answered question, ``scores`` computes scores from the
    verdicts by case name, and ``rules`` computes scores without a judge; scores are per question.
    """

    name: str
    load: Callable[[Path], list[OpenQuestion]]
    cases: Callable[[AnsweredQuestion, JudgePrompts], Cases]
    scores: Callable[[Mapping[str, PerQuestion]], dict[str, PerQuestion]]
    rules: Mapping[str, Callable[[str], bool]]


def _rating_cases(answered: AnsweredQuestion, prompts: JudgePrompts) -> Cases:
    """One rating per turn."""
    question, texts = answered.question, answered.texts
    kind = "rating_reference" if question.reference else "rating"
    fields = {f"ref_answer_{i}": text for i, text in enumerate(question.reference, start=1)}
    first = {"question": question.turns[0], "answer": texts[0]} | fields
    cases = {"turn_1": Case(Scale.RATING, prompts.messages(kind, **first))}
    if len(texts) > 1:
        both = {f"question_{i}": text for i, text in enumerate(question.turns, start=1)}
        both |= {f"answer_{i}": text for i, text in enumerate(texts, start=1)}
        cases["turn_2"] = Case(Scale.RATING, prompts.messages(f"{kind}_second", **both | fields))
    return cases


def _pair_cases(answered: AnsweredQuestion, prompts: JudgePrompts) -> Cases:
    """The answer against the baseline's, in both orders."""
    question, answer = answered.question.turns[0], answered.texts[0]
    baseline = str(answered.question.baseline)
    first = prompts.messages("pair", question=question, answer_a=answer, answer_b=baseline)
    second = prompts.messages("pair", question=question, answer_a=baseline, answer_b=answer)
    return {"first": Case(Scale.PAIR, first), "second": Case(Scale.PAIR, second)}


def _harm_cases(answered: AnsweredQuestion, prompts: JudgePrompts) -> Cases:
    question, answer = answered.question.turns[0], answered.texts[0]
    messages = prompts.messages("harm", question=question, answer=answer)
    return {"harm": Case(Scale.HARM, messages)}


def _mt_bench_scores(verdicts: Mapping[str, PerQuestion]) -> dict[str, PerQuestion]:
    """Ratings of both turns, and the mean of the available ones."""
    both = np.stack([verdicts["turn_1"], verdicts["turn_2"]])
    known = (~np.isnan(both)).sum(0)
    mean = np.nansum(both, axis=0) / np.maximum(known, 1)
    return {**verdicts, "average": np.where(known > 0, mean, np.nan)}


def _pair_scores(verdicts: Mapping[str, PerQuestion]) -> dict[str, PerQuestion]:
    """Questions count if both orders have a verdict: 1 for each order won, 0.5 for a tie."""
    first, second = verdicts["first"], 1.0 - verdicts["second"]
    known = ~np.isnan(first + second)
    ties = np.stack([first == 0.5, second == 0.5]).mean(0)
    return {
        "win_rate": (first + second) / 2,
        "tie_rate": np.where(known, ties, np.nan),
        "consistency": np.where(known, (first == second).astype(np.float64), np.nan),
    }


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("mt_bench", questions.mt_bench, _rating_cases, _mt_bench_scores, {}),
        Benchmark(
            "vicuna_bench",
            questions.vicuna_bench,
            _rating_cases,
            lambda verdicts: {"score": verdicts["turn_1"]},
            {},
        ),
        Benchmark("alpaca_eval", questions.alpaca_eval, _pair_cases, _pair_scores, {}),
        Benchmark(
            "advbench",
            questions.advbench,
            _harm_cases,
            lambda verdicts: {"harmless_judge": verdicts["harm"]},
            {
                "harmless_rule": refuses_openfedllm,
                "harmless_rule_advbench": refuses_advbench,
            },
        ),
    )
}


def rule_scores(
    benchmark: Benchmark, answered: Sequence[AnsweredQuestion]
) -> dict[str, PerQuestion]:
    """Scores by rule, one per question."""
    return {
        name: np.array([rule(item.texts[0]) for item in answered], np.float64)
        for name, rule in benchmark.rules.items()
    }
