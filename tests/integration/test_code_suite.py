"""The suite ``code`` end to end: the embedded model answers, its programs run."""

import json
from pathlib import Path

import pytest

from fedllm_flwr.commands.main import main
from fedllm_flwr.evaluation.sandbox.bubblewrap import why_refused

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_refused() is not None, reason=str(why_refused())),
]
CODE = "def twice(x):\n    return 2 * x"


def evaluate(folder: Path, name: str, *options: str) -> list[dict[str, object]]:
    """The samples of MBPP that the command leaves."""
    rows = [
        {"task_id": i, "text": "Double x.", "code": CODE, "test_list": ["assert twice(2) == 4"]}
        for i in (2, 3, 11, 12)
    ]
    (folder / "mbpp.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    output = folder / name
    arguments = ["--task", "mbpp", "--data-root", str(folder), "--output", str(output)]
    assert main(["evaluate", "--base", "embedded", "--no-cache", *arguments, *options]) == 0
    lines = (output / "predictions" / "base" / "mbpp.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_answers_are_run_only_with_leave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = evaluate(tmp_path, "held")
    assert "not run; --allow-code-execution" in capsys.readouterr().out
    ran = evaluate(tmp_path, "ran", "--allow-code-execution", "--samples", "10")
    table = capsys.readouterr().out

    assert [sample["id"] for sample in held] == ["MBPP/11", "MBPP/12"]
    assert all("pass@1" not in sample and len(sample["answers"]) == 1 for sample in held)
    assert all(sample["pass@1"] == sample["pass@10"] == 0.0 for sample in ran)
    assert all(len(sample["outcomes"]) == len(sample["answers"]) == 10 for sample in ran)
    assert len({answer for sample in ran for answer in sample["answers"]}) > 1
    assert "pass@1" in table
    assert "0.000" in table
