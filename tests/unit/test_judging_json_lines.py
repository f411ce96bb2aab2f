"""The file of records: what is in it stays, whoever ends in the middle."""

from pathlib import Path

import pytest

from fedllm_flwr.errors import ConfigError, DataError, FederationError
from fedllm_flwr.evaluation.judging.json_lines import json_lines

TEXTS = ["plain", "a line\nand\u2028another", "\ud800 half a pair", "日本"]


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    with json_lines(path) as file:
        assert file.records == []
        file.append([{"text": text} for text in TEXTS[:2]])
        file.append([{"text": text} for text in TEXTS[2:]])
        assert [record["text"] for record in file.records] == TEXTS
    with json_lines(path) as file:
        assert [record["text"] for record in file.records] == TEXTS


@pytest.mark.parametrize("torn", [b"{", b'{"text": "hal', b'{"text": "whole"}'])
def test_a_torn_line_is_dropped_and_the_next_record_is_whole(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + torn)
    with json_lines(path) as file:
        assert file.records == [{"text": "first"}]
        file.append([{"text": "second"}])
    assert path.read_text().splitlines() == ['{"text": "first"}', '{"text": "second"}']


@pytest.mark.parametrize("line", ["{broken", "[1]", ""])
def test_a_broken_line_in_the_middle_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    with (
        pytest.raises(DataError, match=r"log.jsonl, line 2: not a JSON object; delete"),
        json_lines(path),
    ):
        pass
    path.write_text('{"a": 1}\n')
    with json_lines(path) as file:  # the lock was given back
        assert file.records == [{"a": 1}]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with (
        json_lines(path),
        pytest.raises(ConfigError, match="is in use by another process"),
        json_lines(path),
    ):
        pass


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FederationError, match=r"cannot write .*log.jsonl"):
        json_lines(tmp_path / "file" / "log.jsonl").__enter__()
