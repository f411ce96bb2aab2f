"""Digests of files and facts about records on disk: made once, never stale, done without."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.data import remembered as module
from fedllm_flwr.data.remembered import path_digest, remembered

HOUR = 3600


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read for their digest."""
    names: list[str] = []

    def digest(stream: Any, name: str) -> Any:
        names.append(Path(stream.name).name)
        return hashlib.file_digest(stream, name)

    monkeypatch.setattr(module, "file_digest", digest)
    return names


def write(file: Path, text: str, age: int = HOUR) -> None:
    file.write_text(text)
    time = file.stat().st_mtime - age
    os.utime(file, (time, time))


def in_a_new_process(path: Path, folder: Path | None) -> str:
    module._file_digest.cache_clear()
    return path_digest(path, folder)


def test_an_unchanged_file_is_hashed_once(tmp_path: Path, hashed: list[str]) -> None:
    data, folder = tmp_path / "d.jsonl", tmp_path / "digests"
    write(data, "one")
    first = in_a_new_process(data, folder)
    assert in_a_new_process(data, folder) == first
    assert hashed == ["d.jsonl"]
    content = f"d.jsonl {hashlib.sha256(b'one').hexdigest()}"
    assert first == hashlib.sha256(content.encode()).hexdigest()

    write(data, "two", 2 * HOUR)  # of the same size
    assert in_a_new_process(data, folder) != first
    write(data, "one", 2 * HOUR)  # of another time, and the same content
    assert in_a_new_process(data, None) == first
    assert len(hashed) == 3


def test_a_file_that_has_just_changed_may_change_again_within_its_time(
    tmp_path: Path, hashed: list[str]
) -> None:
    data, folder = tmp_path / "d.jsonl", tmp_path / "digests"
    write(data, "one", age=0)
    in_a_new_process(data, folder)
    in_a_new_process(data, folder)
    assert len(hashed) == 2
    assert not folder.exists()


def test_a_directory_is_all_of_its_files(tmp_path: Path, hashed: list[str]) -> None:
    folder, data = tmp_path / "digests", tmp_path / "data"
    (data / "inner").mkdir(parents=True)
    write(data / "a.jsonl", "a")
    write(data / "inner/b.jsonl", "b")
    first = in_a_new_process(data, folder)
    write(data / "inner/b.jsonl", "c", 2 * HOUR)
    assert in_a_new_process(data, folder) != first
    assert hashed == ["a.jsonl", "b.jsonl", "b.jsonl"]
    assert path_digest(tmp_path / "nothing", folder) == ""


def test_broken_and_unwritable_notes_are_done_without(tmp_path: Path, hashed: list[str]) -> None:
    data, folder = tmp_path / "d.jsonl", tmp_path / "digests"
    write(data, "one")
    first = in_a_new_process(data, folder)
    (note,) = folder.iterdir()
    note.write_text("garbage")
    assert in_a_new_process(data, folder) == first
    assert in_a_new_process(data, data / "below a file") == first
    assert len(hashed) == 3


def test_facts_are_made_once_and_anew_where_they_are_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[str] = []

    def ask(name: str, folder: Path = tmp_path) -> Any:
        def make() -> Any:
            made.append(name)
            return {"rows": np.arange(len(name))}, {"name": name, "turns": ["é\u2028"]}

        return remembered(("facts", name), make, folder)

    first = ask("some")
    again = ask("some")
    np.testing.assert_array_equal(first[0]["rows"], again[0]["rows"])
    assert first[1] == again[1] == {"name": "some", "turns": ["é\u2028"]}
    ask("other")
    assert made == ["some", "other"]
    for path in tmp_path.iterdir():
        path.write_bytes(b"garbage" * 100)
    assert ask("some")[1] == first[1]
    assert "is recomputed" in caplog.text
    (tmp_path / "file").write_text("")
    assert ask("some", tmp_path / "file" / "below")[1] == first[1]
    assert "are not cached" in caplog.text
