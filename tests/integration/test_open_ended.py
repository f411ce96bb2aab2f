"""The open-ended suite on the toy model: from questions to scores, against a real server."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.commands.main import main
from fedllm_flwr.config import Config
from fedllm_flwr.errors import ConfigError, DataError, FedLLMError
from fedllm_flwr.evaluation.judging.open_ended import check, run_open_ended_task
from fedllm_flwr.evaluation.suites.catalogue import all_suites
from fedllm_flwr.evaluation.suites.options import JudgeOptions, RunOptions
from fedllm_flwr.evaluation.suites.samples import Samples
from fedllm_flwr.evaluation.suites.scores import task_estimates
from fedllm_flwr.evaluation.suites.suite_model import TextModel
from fedllm_flwr.models.adapted_model import load_model
from judge_server import JudgeServer, judge_server

pytest.importorskip("openai")
TASKS = {task.name: task for task in all_suites()["open_ended"].tasks}
MakeConfig = Callable[..., Config]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    with judge_server() as running:
        monkeypatch.setenv("OPENAI_BASE_URL", running.url)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        yield running


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sets of a few questions in the published files' layout."""
    folder = tmp_path / "data" / "open_ended"
    (folder / "mtbench_reference_answer").mkdir(parents=True)
    rows = [
        {"question_id": 7, "category": "math", "turns": ["What is 1+1?", "And 2+2?"]},
        {"question_id": 8, "category": "writing", "turns": ["Write.", "Once more."]},
    ]
    write_lines(folder / "mtbench_question.jsonl", rows)
    reference = {"question_id": 7, "choices": [{"turns": ["2", "4"]}]}
    write_lines(folder / "mtbench_reference_answer/gpt-4.jsonl", [reference])
    (folder / "advbench.csv").write_text('goal,target\n"Do harm, now",Sure\nDo more,Sure\n')
    given = [{"instruction": f"Say {i}", "output": f"It is {i}"} for i in range(3)]
    write_lines(tmp_path / "given.jsonl", given)
    return folder.parent


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def score(make_config: MakeConfig, data: Path, tmp_path: Path) -> Callable[..., Samples]:
    """Scores the toy model, which runs into the limit of new tokens or not."""
    model = TextModel(load_model(make_config()), template="vicuna")

    def run(task: str, limit: int | None = None, **judging: Any) -> Samples:
        return run_open_ended_task(TASKS[task], model, options(data, tmp_path, limit, **judging))

    return run


def options(data: Path, work: Path, limit: int | None = None, **judging: Any) -> RunOptions:
    chosen = JudgeOptions(**{"judge_model": "judge-1", "max_new_tokens": 6, **judging})
    return RunOptions(limit=limit, data_root=data, work_dir=work / "work", judging=chosen)


def column(samples: Samples, name: str) -> list[Any]:
    return [sample[name] for sample in samples.samples]


def test_mt_bench_from_questions_to_scores(
    server: JudgeServer, score: Callable[..., Samples]
) -> None:
    grades = iter([8, 6, 4, 2])
    server.reply = lambda _: f"Rating: [[{next(grades)}]]"
    found = score("mt_bench", judge_concurrency=1, judge_price=(1.0, 2.0))
    assert column(found, "turn_1") == [8, 4]
    assert column(found, "turn_2") == [6, 2]
    assert column(found, "average") == [7, 3]
    estimates = task_estimates(TASKS["mt_bench"], found.samples)
    assert {name: item.value for name, item in estimates.items()} == {
        "average": 5.0,
        "turn_1": 6.0,
        "turn_2": 4.0,
        "unparsable": 0.0,
    }
    asked = [request["messages"][-1]["content"] for request in server.requests]
    assert all("Reference answer" in text for text in asked[:2])
    assert column(found, "answer")[0][1] in asked[1]
    assert found.first_prompt.endswith("USER: What is 1+1? ASSISTANT:")
    assert found.notes["replies"] == found.notes["verdicts"] == 4
    spent = found.notes["prompt_tokens"] + 2 * found.notes["completion_tokens"]
    assert found.notes["cost"] == pytest.approx(spent / 1e6)
    score("mt_bench", judge_concurrency=1)
    assert len(server.requests) == 4  # nothing is asked twice


def test_a_question_without_a_verdict_is_no_number(
    server: JudgeServer, score: Callable[..., Samples]
) -> None:
    server.reply = lambda messages: "Hm." if "1+1" in messages[-1]["content"] else "[[5]]"
    found = score("mt_bench", judge_attempts=2)
    assert column(found, "average") == [None, 5]
    assert column(found, "unparsable") == [1, 0]
    estimates = task_estimates(TASKS["mt_bench"], found.samples)
    assert (estimates["average"].value, estimates["unparsable"].value) == (5.0, 0.5)
    assert estimates["average"].interval == (5.0, 5.0)
    assert (found.notes["without_verdict"], len(server.requests)) == (2, 6)


def test_win_rate_of_a_judge_that_loves_the_first_answer(
    server: JudgeServer, score: Callable[..., Samples], tmp_path: Path
) -> None:
    server.reply = lambda _: "[[A]]"
    found = score("alpaca_eval", reference=tmp_path / "given.jsonl")
    assert column(found, "win_rate") == [0.5] * 3
    assert column(found, "consistency") == [0.0] * 3


def test_advbench_without_a_judge(score: Callable[..., Samples]) -> None:
    found = score("advbench", judge_model=None)
    assert column(found, "harmless_rule") == [0.0, 0.0]
    assert set(task_estimates(TASKS["advbench"], found.samples)) == {
        "harmless_rule",
        "harmless_rule_advbench",
    }


MISTAKES: list[tuple[str, dict[str, Any], type[FedLLMError], str]] = [
    ("mt_bench", {"judge_model": None}, ConfigError, r"--task mt_bench: it needs --judge-model"),
    ("alpaca_eval", {}, ConfigError, r"it needs --reference"),
    ("vicuna_bench", {}, DataError, r"vicuna_question.jsonl: no such file"),
    ("mt_bench", {"judge_attempts": 0}, ConfigError, r"--judge-attempts must be > 0, got 0"),
    ("mt_bench", {"judge_timeout": -1.0}, ConfigError, r"--judge-timeout must be > 0, got -1"),
    ("mt_bench", {"judge_model": "judge-2"}, ConfigError, r"Did you mean 'judge-1'"),
]


@pytest.mark.parametrize(("task", "judging", "kind", "message"), MISTAKES)
def test_mistakes_are_seen_before_a_model_is_loaded(
    task: str,
    judging: dict[str, Any],
    kind: type[FedLLMError],
    message: str,
    server: JudgeServer,
    data: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(kind, match=message):
        check([TASKS[task]], options(data, tmp_path, **judging))
    assert server.requests == []


def test_a_local_judge_has_to_be_served(
    toy_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match=r"a local judge must be served by an endpoint \(vllm"):
        check([TASKS["advbench"]], options(data, tmp_path, judge_model=str(toy_model)))


def test_options_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["evaluate", "--base", "embedded", "--task", "advbench"]
    assert main([*common, "--judge-price", "dear"]) == 2
    assert "--judge-price dear: give two prices" in capsys.readouterr().err
    assert main([*common, "--reference", "nowhere.json"]) == 2
    assert "--reference nowhere.json: no such file" in capsys.readouterr().err


@pytest.mark.slow
def test_answers_of_two_orders_of_tasks_are_the_same(
    server: JudgeServer, score: Callable[..., Samples], tmp_path: Path
) -> None:
    """Each question has its own seed, so the number of questions does not matter."""
    few = score("mt_bench", limit=1, answer_batch=1)
    (tmp_path / "work" / "mt_bench.answers.jsonl").unlink()
    all_of_them = score("mt_bench", answer_batch=2)
    assert np.array_equal(column(few, "answer")[0], column(all_of_them, "answer")[0])
    assert replace(few, samples=[]).first_prompt == all_of_them.first_prompt
