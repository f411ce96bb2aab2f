"""`fedllm evaluate` on open-ended questions, killed in the middle and started again."""

import json
import signal
import socket
from pathlib import Path

import pytest

from judge_server import JudgeServer, judge_server
from processes import free_ports, started, wait_for

pytest.importorskip("openai")


def write_questions(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    rows = [
        {"question_id": i, "category": "generic", "turns": [f"What is {i}?"]} for i in range(count)
    ]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "vicuna_question.jsonl").write_text(text)


def command(tmp_path: Path) -> list[str]:
    return [
        *("fedllm", "evaluate", "--base", "embedded", "--task", "vicuna_bench"),
        *("--data-root", str(tmp_path / "data"), "--judge-model", "judge-1"),
        *("--max-new-tokens", "4", "--judge-concurrency", "3"),
        *("--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")),
    ]


def run(tmp_path: Path, server: JudgeServer) -> None:
    with started(command(tmp_path), tmp_path, **variables(server)) as process:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def variables(server: JudgeServer) -> dict[str, str]:
    return {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "secret"}


@pytest.mark.slow
def test_killed_in_the_middle_of_judging(tmp_path: Path) -> None:
    write_questions(tmp_path / "data" / "open_ended", 40)
    faults = [429, "truncated", "reset", "malformed"]
    with judge_server(delay_s=0.2, faults=faults) as server:
        with started(command(tmp_path), tmp_path, **variables(server)) as process:
            assert wait_for(lambda: sum(server.completed.values()) >= 12, 300)
            process.send_signal(signal.SIGKILL)
            process.wait()
        [verdicts] = (tmp_path / "cache" / "work").glob("*/vicuna_bench.verdicts.jsonl")
        kept = [json.loads(line) for line in verdicts.read_text().splitlines()]
        assert 8 <= len(kept) < 40
        before = sum(server.completed.values())
        answers = verdicts.with_name("vicuna_bench.answers.jsonl").read_bytes()
        run(tmp_path, server)
        assert verdicts.with_name("vicuna_bench.answers.jsonl").read_bytes() == answers

        entries = [json.loads(line) for line in verdicts.read_text().splitlines()]
        assert entries[: len(kept)] == kept  # nothing lost
        settled = {entry["key"] for entry in entries if entry["verdict"] is not None}
        assert len(settled) == 40
        attempts = [(entry["key"], entry["attempt"]) for entry in entries]
        assert len(set(attempts)) == len(attempts) == 41  # one was malformed, and asked again
        # Whole replies that were never recorded: at most those under way at the kill.
        assert before - len(kept) <= 3
        assert sum(server.completed.values()) - len(entries) == before - len(kept)

        seen = len(server.requests)
        run(tmp_path, server)
        assert len(server.requests) == seen
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert [row.split(",")[2] for row in rows[1:]] == ["score", "unparsable"]


@pytest.mark.slow
def test_a_served_model_writes_and_judges(copied: Path, tmp_path: Path) -> None:
    """``transformers serve`` with a toy model: all replies come, and none has a verdict."""
    for name in ("fastapi", "uvicorn"):
        pytest.importorskip(name, reason="pip install 'transformers[serving]'")
    template = "{% for turn in messages %}{{ turn['content'][:200] }}\n{% endfor %}"
    (copied / "chat_template.jinja").write_text(template)
    write_questions(tmp_path / "data" / "open_ended", 2)
    port = free_ports(1)
    serve = ["transformers", "serve", str(copied), "--port", str(port), "--device", "cpu"]
    there = {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1"}
    options = ["--writer-url", there["OPENAI_BASE_URL"], "--judge-attempts", "1"]
    evaluate = [word if word != "judge-1" else str(copied) for word in command(tmp_path)]
    evaluate[evaluate.index("embedded")] = str(copied)
    with started(serve, tmp_path):
        assert wait_for(lambda: is_listening(port), 300)
        with started([*evaluate, *options], tmp_path, **there) as process:
            out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert f"judge {copied}: 2 replies for 2 verdicts" in out
    [answers] = (tmp_path / "cache" / "work").glob("*/vicuna_bench.answers.jsonl")
    written = [json.loads(line)["answers"][0] for line in answers.read_text().splitlines()]
    assert len(written) == 2
    assert all(0 < answer["num_tokens"] <= 4 for answer in written)


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
