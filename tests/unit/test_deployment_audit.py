"""A site's audit log: every line is bound to the one before, and what is missing is named."""

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm_flwr.commands import main as cli
from fedllm_flwr.deployment.audit import AuditLog
from fedllm_flwr.errors import FederationError


def filled(folder: Path, count: int = 5, largest_file: int = 2**20) -> AuditLog:
    log = AuditLog(folder, largest_file)
    for number in range(count):
        log.append({"event": "train", "run": "7", "round": number}, {"lora": {"r": 8}})
    return log


def lines_of(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


def test_each_entry_carries_the_hash_of_the_one_before(tmp_path: Path) -> None:
    filled(tmp_path)
    [file] = tmp_path.glob("audit-*.jsonl")

    previous = "0" * 64
    for number, line in enumerate(lines_of(file), 1):
        entry = json.loads(line)
        assert (entry["sequence"], entry["previous"]) == (number, previous)
        previous = entry.pop("hash")
        assert previous == hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
    assert AuditLog(tmp_path).read().problems == []
    assert AuditLog(tmp_path).read().head == previous
    assert {f.stat().st_mode & 0o077 for f in tmp_path.glob("audit-*")} == {0}


def test_settings_are_written_once_in_each_file(tmp_path: Path) -> None:
    log = filled(tmp_path, 6, largest_file=900)

    assert len(log.files()) > 1
    for file in log.files():
        with_settings = ["settings" in json.loads(line) for line in lines_of(file)]
        assert with_settings == [True] + [False] * (len(with_settings) - 1)
    assert log.read().problems == []
    assert [entry["round"] for entry in log.read().entries] == list(range(6))


def without_line(lines: list[bytes]) -> list[bytes]:
    return [*lines[:1], *lines[2:]]


def changed_line(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"round": 1', b'"round": 9'), *lines[2:]]


def rewritten_line(lines: list[bytes]) -> list[bytes]:
    """Changed with a hash that fits it: the next line gives it away."""
    entry = json.loads(lines[1])
    del entry["hash"]
    entry["round"] = 9
    entry["hash"] = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
    return [lines[0], json.dumps(entry).encode() + b"\n", *lines[2:]]


def no_json(lines: list[bytes]) -> list[bytes]:
    return [lines[0], b"{\n", *lines[2:]]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without_line, "line 2: entry 3 follows entry 1"),
        (changed_line, "line 2: it was changed"),
        (rewritten_line, "line 3: the line before it was changed"),
        (no_json, "line 2: not an entry"),
        (lambda lines: lines[:3], "entries 4 to 5 are missing at the end"),
    ],
)
def test_break_is_named_by_line(
    change: Callable[[list[bytes]], list[bytes]],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "node.toml").write_text("")
    log = filled(tmp_path / "audit")
    [file] = log.files()
    file.write_bytes(b"".join(change(lines_of(file))))

    assert any(named in problem for problem in log.read().problems)
    assert cli.main(["site", "log", str(tmp_path)]) == 1
    assert named in capsys.readouterr().err.replace("\n", " ")


def test_what_a_power_failure_left_of_a_line_is_removed_by_the_next_entry(tmp_path: Path) -> None:
    log = filled(tmp_path, 2)
    [file] = log.files()
    with file.open("ab") as stream:
        stream.write(b'{"sequence": 3, "ti')

    assert log.read().problems == [f"{file.name}, line 3: not an entry of this log"]
    log.append({"event": "train", "run": "7", "round": 2})
    assert log.read().problems == []
    assert [entry["sequence"] for entry in log.read().entries] == [1, 2, 3]


def test_old_files_may_be_moved_away(tmp_path: Path) -> None:
    log = filled(tmp_path, 6, largest_file=900)
    first, *_ = log.files()
    removed = len(lines_of(first))
    first.unlink()

    report = log.read()
    assert report.problems == []
    assert report.removed == removed
    for file in log.files():
        file.unlink()
    log.append({"event": "train", "run": "7"})
    assert log.read().problems == []
    assert [entry["sequence"] for entry in log.read().entries] == [7]


def test_threads_and_processes_do_not_break_the_chain(tmp_path: Path) -> None:
    def write() -> None:
        for _ in range(10):
            AuditLog(tmp_path).append({"event": "query", "run": "7"})

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    report = AuditLog(tmp_path).read()
    assert report.problems == []
    assert len(report.entries) == 40


def test_waiting_is_noted_once_for_each_run_and_settings(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    for run, digest in (("7", "a"), ("7", "a"), ("8", "a"), ("7", "a"), ("7", "b"), ("7", "b")):
        log.append({"event": "query", "run": run, "settings_digest": digest, "verdict": "waiting"})

    runs = [(entry["run"], entry["settings_digest"]) for entry in log.read().entries]
    assert runs == [("7", "a"), ("8", "a"), ("7", "b")]


def test_log_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("a file in its place")
    with pytest.raises(FederationError, match="cannot write the audit log"):
        AuditLog(tmp_path / "audit").append({"event": "train"})
