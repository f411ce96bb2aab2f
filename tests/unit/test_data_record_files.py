"""File formats of records, and one clear line for each way in which a file is unusable."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from fedllm_flwr.data import record_files
from fedllm_flwr.data.record_files import BadLine, Record, open_records, refuse
from fedllm_flwr.errors import DataError

RECORDS = [
    {"instruction": "Name a café.", "output": "Café\u2028Müller"},
    {"instruction": 'Two\nlines, and "quotes"', "output": "✓"},
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "output"])
        writer.writeheader()
        writer.writerows(RECORDS)


WRITERS = {
    "list.json": lambda path: path.write_text(json.dumps(RECORDS)),
    "lines.json": lambda path: path.write_text(LINES, "utf-8"),
    "lines.jsonl": lambda path: path.write_text(LINES, "utf-8"),
    "bom.jsonl": lambda path: path.write_text(LINES, "utf-8-sig"),
    "crlf.jsonl": lambda path: path.write_bytes(LINES.replace("\n", "\r\n\r\n").encode()),
    "UPPER.JSONL": lambda path: path.write_text(LINES, "utf-8"),
    "list.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(RECORDS).encode())),
    "lines.v2.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "table.csv": write_csv,
    "table.parquet": lambda path: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(RECORDS), path
    ),
    "saved": lambda path: datasets.Dataset.from_list(RECORDS).save_to_disk(str(path)),
}


def read_records(
    path: Path, split: str | None = None, on_bad_line: BadLine = refuse
) -> list[Record]:
    return [record for file in open_records(path, split) for record in file.read(on_bad_line)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)

    assert read_records(tmp_path / name) == RECORDS


@pytest.mark.parametrize("piece", [1, 2, 7, 50])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_read_in_pieces(
    piece: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_files, "_PIECE", piece)
    records = [*RECORDS, {"a": {"b": ["],", "}"]}}, {}, {"x": "\\"}, {"y": '"'}]
    (tmp_path / "list.json").write_text(f" {json.dumps(records, indent=indent)}\n")
    assert read_records(tmp_path / "list.json") == records


def test_directory_reads_its_record_files_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"x": 2}\n')
    (tmp_path / "a.json").write_text('[{"x": 1}]')
    (tmp_path / "README.md").write_text("not records")

    assert read_records(tmp_path, split="train") == [{"x": 1}, {"x": 2}]


def test_directory_with_files_named_after_splits_reads_the_split_only(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00001.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "test.jsonl").write_text('{"x": 2}\n')

    assert read_records(tmp_path, split="train") == [{"x": 1}]
    assert read_records(tmp_path, split="test") == [{"x": 2}]
    with pytest.raises(DataError, match=r"no file is named after the split 'dev'; there are: test"):
        read_records(tmp_path, split="dev")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["train.jsonl", "more.csv"],
            r"train\.jsonl is named after .* 'train', but more\.csv after",
        ),
        (["a.jsonl", "b.tsv"], r"b\.tsv cannot be read; convert to one of: json, jsonl, csv"),
        (["test.jsonl"], "every file is named after another split than 'train': test.jsonl"),
    ],
)
def test_directory_whose_training_files_are_unclear(
    files: list[str], message: str, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).write_text('{"x": 1}\n')

    with pytest.raises(DataError, match=message):
        read_records(tmp_path, split="train")


def test_files_of_other_splits_are_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "test.jsonl").write_text('{"x": 2}\n')

    assert read_records(tmp_path, split="train") == [{"x": 1}]


def test_saved_dataset_dict_reads_the_split(tmp_path: Path) -> None:
    saved = datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS))
    saved.save_to_disk(str(tmp_path / "saved"))

    assert read_records(tmp_path / "saved", split="train") == RECORDS
    with pytest.raises(DataError, match=r"has no split 'test'; it has: train\. .*data\.split"):
        read_records(tmp_path / "saved", split="test")


BROKEN = {
    "empty.jsonl": (b"", "the file is empty"),
    "blank.json": (b" \n ", "the file is empty"),
    "line.jsonl": (
        b'{"x": 1}\n\n{"x": 1 "y": 2}\n',
        r"line\.jsonl, line 3: not valid JSON \(Expecting ',' delimiter at column 9\)\. "
        r"Fix the line, or drop bad lines with data\.on_bad_record=skip",
    ),
    "end.jsonl": (
        b'{"x": \n{"x": 1}\n',
        r"end\.jsonl, line 1: not valid JSON \(Expecting value at column 7\)",
    ),
    "number.jsonl": (b'{"x": 1}\n2\n', r"number\.jsonl, line 2: a JSON number, not an object"),
    "list.jsonl": (b'[{"x": 1}]', "line 1: a JSON list, not an object"),
    "broken.json": (b'[{"x": 1},\n{"x" 2}]', "line 2: not valid JSON"),
    "dict.json": (b'{"a": {"x": 1}}', "holds one JSON object, not a list of records"),
    "strings.json": (b'[{"x": 1}, "two"]', "record 2: a JSON string, not an object"),
    "latin.jsonl": ('{"x": "é"}'.encode("latin-1"), r"not UTF-8 \(byte 7\); convert it"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-9], "cannot be read"),
    "plain.jsonl.gz": (LINES.encode(), "cannot be read"),
    "wide.csv": (b"a,b\n1,2,3\n", "record 1: more fields than the header has"),
    "semicolons.csv": (b"a;b\n1;2,5\n", "seems to use ';' as separator; save it with commas"),
    "tabs.csv": (b"a\tb\n1\t2\n", "seems to use tabs as separator"),
    "quote.csv": (b'a,b\n"1,2\n', r"quote\.csv, line \d: not valid CSV"),
    "broken.parquet": (b"PAR1 but not really", "not a readable parquet file"),
    "notes.txt": (b"hello", r"unknown extension '\.txt'; give one of: json, jsonl, csv"),
    "archive.tar.gz": (b"hello", r"unknown extension '\.gz'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_file_is_one_clear_line(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=message) as caught:
        read_records(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_missing_file_and_directories_without_records(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or directory"):
        read_records(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="no record file in this directory"):
        read_records(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="not a readable saved data set"):
        read_records(tmp_path)


def test_bad_lines_can_be_collected_instead(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"x": 1}\n{"x"\n{"x": 2}\nnull\n')
    bad: list[str] = []

    assert read_records(tmp_path / "some.jsonl", on_bad_line=bad.append) == [{"x": 1}, {"x": 2}]
    assert [message.split(":")[0] for message in bad] == [
        "some.jsonl, line 2",
        "some.jsonl, line 4",
    ]
