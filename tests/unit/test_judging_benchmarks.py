"""The open-ended sets: their files, what the judge is asked, and scores against hand counts."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.errors import DataError
from fedllm_flwr.evaluation.judging import questions
from fedllm_flwr.evaluation.judging.benchmarks import BENCHMARKS, Cases, rule_scores
from fedllm_flwr.evaluation.judging.prompts import load_prompts
from fedllm_flwr.evaluation.judging.questions import OpenQuestion
from fedllm_flwr.evaluation.judging.written_answers import AnsweredQuestion, WrittenAnswer

SUITE = Path(__file__).parents[2] / "evaluation" / "open_ended"
SHARED = Path(__file__).parents[3] / "shared/data/eval/open_ended"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the project")
NAN = float("nan")


def answered(question: OpenQuestion, *texts: str) -> AnsweredQuestion:
    return AnsweredQuestion(question, tuple(WrittenAnswer(text, 1, True, 0) for text in texts))


def cases_of(name: str, item: AnsweredQuestion) -> Cases:
    return BENCHMARKS[name].cases(item, load_prompts(SUITE / "prompts.yaml", None))


def text_of(cases: Cases, name: str) -> str:
    return "\n".join(message["content"] for message in cases[name].messages)


def test_ratings_of_two_turns_with_a_reference() -> None:
    question = OpenQuestion(
        "1", "math", ("What is 1+1?", "And 2+2?"), 0.0, ("It is 2.", "It is 4.")
    )
    cases = cases_of("mt_bench", answered(question, "Two {maybe}", "Four"))
    assert list(cases) == ["turn_1", "turn_2"]
    first, second = text_of(cases, "turn_1"), text_of(cases, "turn_2")
    assert all(part in first for part in ("What is 1+1?", "It is 2.", "Two {maybe}", "[[grade]]"))
    assert "Four" not in first
    everything = ("What is 1+1?", "And 2+2?", "It is 2.", "It is 4.", "Two {maybe}", "Four")
    assert [second.index(part) for part in everything]
    assert [turn["role"] for turn in cases["turn_2"].messages] == ["system", "user"]


def test_ratings_without_a_reference() -> None:
    question = OpenQuestion("1", "writing", ("Write.", "Again."), 0.7)
    cases = cases_of("mt_bench", answered(question, "One", "Two"))
    assert "reference" not in (text_of(cases, "turn_1") + text_of(cases, "turn_2")).lower()
    assert list(cases_of("vicuna_bench", answered(OpenQuestion("1", "x", ("Q",), 0.7), "A"))) == [
        "turn_1"
    ]


def test_pairs_are_asked_in_both_orders() -> None:
    question = OpenQuestion("1", "", ("Which?",), 0.7, baseline="the given one")
    cases = cases_of("alpaca_eval", answered(question, "the model's"))
    first, second = text_of(cases, "first"), text_of(cases, "second")
    assert first.index("the model's") < first.index("the given one")
    assert second.index("the given one") < second.index("the model's")


def scores(name: str, **verdicts: list[float]) -> dict[str, list[float]]:
    values = {case: np.array(some) for case, some in verdicts.items()}
    return {metric: some.tolist() for metric, some in BENCHMARKS[name].scores(values).items()}


def test_win_rate_by_hand() -> None:
    """Verdicts say whether the first answer shown is better: 1, 0, 0.5 for a tie."""
    found = scores(
        "alpaca_eval",
        #      won twice, lost twice, the first one wins, tie twice, tie and won, one unknown
        first=[1.0, 0.0, 1.0, 0.5, 0.5, NAN],
        second=[0.0, 1.0, 1.0, 0.5, 0.0, 0.0],
    )
    np.testing.assert_equal(found["win_rate"], [1.0, 0.0, 0.5, 0.5, 0.75, NAN])
    np.testing.assert_equal(found["tie_rate"], [0.0, 0.0, 0.0, 1.0, 0.5, NAN])
    np.testing.assert_equal(found["consistency"], [1.0, 1.0, 0.0, 1.0, 0.0, NAN])


def test_mt_bench_average_by_hand() -> None:
    found = scores("mt_bench", turn_1=[8.0, 3.0, NAN, NAN], turn_2=[6.0, NAN, 5.0, NAN])
    np.testing.assert_equal(found["average"], [7.0, 3.0, 5.0, NAN])
    np.testing.assert_equal(found["turn_2"], [6.0, NAN, 5.0, NAN])


def test_rules_by_hand() -> None:
    question = OpenQuestion("0", "harmful", ("How?",), 0.0)
    texts = ["I'm sorry, no.", "Sure: first", "that is ILLEGAL"]
    found = rule_scores(BENCHMARKS["advbench"], [answered(question, text) for text in texts])
    assert found["harmless_rule"].tolist() == [1.0, 0.0, 1.0]
    assert found["harmless_rule_advbench"].tolist() == [1.0, 0.0, 0.0]


def write_mt_bench(folder: Path, rows: list[dict[str, Any]], references: dict[int, Any]) -> None:
    (folder / "mtbench_reference_answer").mkdir()
    lines = [
        json.dumps({"question_id": key, "choices": [{"turns": turns}]})
        for key, turns in references.items()
    ]
    (folder / "mtbench_reference_answer/gpt-4.jsonl").write_text("\n".join(lines))
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    (folder / "mtbench_question.jsonl").write_text(text)


def test_questions_of_mt_bench(tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "category": "math", "turns": ["a\u2028b", "c"]},
        {"question_id": 2, "category": "writing", "turns": ["d", "e"], "reference": ["x"]},
    ]
    write_mt_bench(tmp_path, rows, {1: ["r", "s"]})
    assert questions.mt_bench(tmp_path) == [
        OpenQuestion("1", "math", ("a\u2028b", "c"), 0.0, ("r", "s")),
        OpenQuestion("2", "writing", ("d", "e"), 0.7),
    ]


def test_a_reference_that_is_not_there(tmp_path: Path) -> None:
    rows = [{"question_id": 1, "category": "coding", "turns": ["a", "b"]}]
    write_mt_bench(tmp_path, rows, {2: ["r", "s"]})
    with pytest.raises(DataError, match=r"question 1 \(coding\) has no reference answer"):
        questions.mt_bench(tmp_path)


def test_mistakes_in_files(tmp_path: Path) -> None:
    file = tmp_path / "answers.json"
    with pytest.raises(DataError, match="no such file; give the data folder"):
        questions.vicuna_bench(tmp_path)
    file.write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        questions.alpaca_eval(file)
    file.write_text('[{"instruction": "a", "output": "b"}, {"instruction": "c"}]')
    with pytest.raises(DataError, match="record 2: no output"):
        questions.alpaca_eval(file)
    file.write_text('{"instruction": "a", ')
    with pytest.raises(DataError, match="cannot be read"):
        questions.alpaca_eval(file)
    (tmp_path / "advbench.csv").write_text("question\nHow?\n")
    with pytest.raises(DataError, match="record 1: no goal"):
        questions.advbench(tmp_path)


@pytest.mark.parametrize("lines", [False, True])
def test_reference_answers_as_a_list_and_as_lines(lines: bool, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Say", "input": "this", "output": "this", "dataset": "own"},
        {"instruction": "Ask", "output": "?"},
    ]
    file = tmp_path / "answers.json"
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    assert questions.alpaca_eval(file) == [
        OpenQuestion("0", "own", ("Say\n\nthis",), 0.7, baseline="this"),
        OpenQuestion("1", "", ("Ask",), 0.7, baseline="?"),
    ]


def test_prompts_of_fastchat_take_the_place_of_ours(tmp_path: Path) -> None:
    theirs = {
        "single-v1": "{question} {answer}",
        "single-math-v1": "{question} {answer} {ref_answer_1}",
        "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
        "single-math-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2} "
        "{ref_answer_1} {ref_answer_2}",
        "pair-v2": "{question} {answer_a} {answer_b}",
    }
    file = tmp_path / "judge_prompts.jsonl"

    def write() -> None:
        rows = [
            {"name": name, "system_prompt": "S\n", "prompt_template": text}
            for name, text in theirs.items()
        ]
        file.write_text("\n".join(map(json.dumps, rows)))

    write()
    own = load_prompts(SUITE / "prompts.yaml", None)
    prompts = load_prompts(SUITE / "prompts.yaml", tmp_path)
    assert (own.source, prompts.source) == ("own", "fastchat")
    assert own.digest != prompts.digest
    assert prompts.messages("rating", question="Q", answer="{A}") == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q {A}"},
    ]
    assert prompts.texts["harm"] == own.texts["harm"]
    theirs["pair-v2"] = "{question} {answer_a}"
    write()
    with pytest.raises(DataError, match="the prompt pair has the fields answer_a, question"):
        load_prompts(SUITE / "prompts.yaml", tmp_path)
    file.write_text('{"name": "single-v1"}')
    with pytest.raises(DataError, match="not FastChat's judge prompts"):
        load_prompts(SUITE / "prompts.yaml", tmp_path)


@needs_shared
def test_the_published_files() -> None:
    mt_bench = questions.mt_bench(SHARED)
    assert len(mt_bench) == 80
    assert all(len(question.turns) == 2 for question in mt_bench)
    with_reference = [question for question in mt_bench if question.reference]
    assert len(with_reference) == 30
    assert {question.category for question in with_reference} == {"math", "reasoning", "coding"}
    assert len(questions.vicuna_bench(SHARED)) == 80
    with (SHARED / "advbench.csv").open(encoding="utf-8", newline="") as lines:
        goals = [row[0] for row in csv.reader(lines)][1:]
    assert [question.turns for question in questions.advbench(SHARED)] == [(g,) for g in goals]
    assert len(goals) == 520
    prompts = load_prompts(SUITE / "prompts.yaml", SHARED)
    assert prompts.source == "fastchat"
    item = answered(with_reference[0], "first", "second")
    assert set(BENCHMARKS["mt_bench"].cases(item, prompts)) == {"turn_1", "turn_2"}
