"""Reading record files: json, jsonl, csv, parquet, arrow directories and folders of those."""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm_flwr.errors import DataError

Record = dict[str, Any]
BadLine = Callable[[str], None]

TEXT_FORMATS = (".json", ".jsonl", ".csv")
FORMATS = "json, jsonl, csv (each also as .gz), parquet, or a directory saved by datasets"

_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_UNREAD = (".tsv", ".ndjson", ".arrow", ".feather", ".xls", ".xlsx", ".zip", ".zst", ".bz2", ".xz")
_NO_RECORDS = ("dataset_infos.json",)  # of older data sets of the hub
_NAMED = 10  # files in a message
_EMPTY = "its data file is empty"


@dataclass(frozen=True)
class FileRecords:
    """The records of one file."""

    name: str  # inside the directory that was read; "" where a single file was
    records: list[Record]


def refuse(message: str) -> None:
    """The default answer to a bad line: raise it."""
    raise DataError(message, "a line of its data file is broken")


def read_parts(
    path: Path, split: str | None = None, on_bad_line: BadLine = refuse
) -> list[FileRecords]:
    """The records of a file or directory, by file, in the order of the files' names.

    ``split`` chooses among the splits of a directory (where no file is named after a split, all
    is training data); files ignore it. ``on_bad_line`` receives
    one message per broken JSON line; what it does not raise is left out. Raises DataError with
    file, place and remedy for anything that cannot be read.
    """
    if not path.exists():
        raise DataError(
            f"{path}: no such file or directory (working directory {Path.cwd()})",
            "its data file is missing",
        )
    parts = (
        _read_directory(path, split, on_bad_line)
        if path.is_dir()
        else [FileRecords("", _read_file(path, on_bad_line))]
    )
    if not any(part.records for part in parts):
        raise DataError(f"{path}: holds no records; give a file with at least one", _EMPTY)
    return parts


def _read_file(path: Path, on_bad_line: BadLine) -> list[Record]:
    """Dispatch on the extension; '.gz' on top of a text format is undone first."""
    extension = _extension(path)
    if extension is None:
        raise DataError(f"{path}: unknown extension {path.suffix!r}; give one of: {FORMATS}")
    if extension == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty", _EMPTY)
    if extension == ".csv":
        return _parse_csv(path, text)
    if extension == ".jsonl":
        return list(_parse_lines(path, text, on_bad_line))
    return _parse_json(path, text, on_bad_line)


def _extension(path: Path) -> str | None:
    """The format's extension without '.gz', or None for a format that is not read here."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in TEXT_FORMATS else None
    return suffixes[-1] if suffixes and suffixes[-1] in (*TEXT_FORMATS, ".parquet") else None


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 (byte {error.start}); convert it, for example with "
            f"'iconv -f {_likely_encoding(content)} -t utf-8'"
        ) from None
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{path}: cannot be read ({error})", "its data file cannot be read"
        ) from None


def _likely_encoding(content: bytes) -> str:
    """What a text that is not UTF-8 probably is, by its byte order mark or its zero bytes."""
    for mark, name in (
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if content.startswith(mark):
            return name
    head = content[:1000]
    if head[1::2].count(0) > len(head) // 4:
        return "utf-16le"
    return "utf-16be" if head[::2].count(0) > len(head) // 4 else "latin1"


def _parse_json(path: Path, text: str, on_bad_line: BadLine) -> list[Record]:
    """A JSON list of objects; JSON lines under the name .json are accepted too."""
    try:
        content = json.loads(text, object_pairs_hook=_record)
    except _TwiceError as error:
        raise DataError(
            f"{path}: an object has two values for {str(error)!r}; give each its own name",
            "two columns of its data file have one name",
        ) from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return list(_parse_lines(path, text, on_bad_line))
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}). "
            f"Fix the file; records one per line belong in a .jsonl file",
            "its data file is no valid JSON",
        ) from None
    if not isinstance(content, list):
        raise DataError(
            f"{path}: holds one JSON {_json_type(content)}, not a list of records; give a list "
            f"of objects, or one object per line in a .jsonl file"
        )
    for number, item in enumerate(content, start=1):
        if not isinstance(item, dict):
            raise DataError(
                f"{path}, record {number}: a JSON {_json_type(item)}, not an object with columns; "
                f"give a list of objects"
            )
    return content


def _parse_lines(path: Path, text: str, on_bad_line: BadLine) -> Iterator[Record]:
    # Not splitlines(): U+2028 and its kind are legal inside JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        remedy = "Fix the line, or drop bad lines with data.on_bad_record=skip"
        try:
            record = json.loads(line, object_pairs_hook=_record)
        except _TwiceError as error:
            reason = f"two values for {str(error)!r}"
            on_bad_line(f"{path.name}, line {number}: {reason}. {remedy}")
            continue
        except json.JSONDecodeError as error:
            reason = f"not valid JSON ({error.msg} at column {error.colno})"
            on_bad_line(f"{path.name}, line {number}: {reason}. {remedy}")
            continue
        if isinstance(record, dict):
            yield record
        else:
            reason = f"a JSON {_json_type(record)}, not an object with columns"
            on_bad_line(f"{path.name}, line {number}: {reason}. {remedy}")


class _TwiceError(Exception):
    """A JSON object has two values for one name; which is meant cannot be told."""


def _record(pairs: list[tuple[str, Any]]) -> Record:
    """A JSON object."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return record


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _parse_csv(path: Path, text: str) -> list[Record]:
    csv.field_size_limit(2**31 - 1)
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        records: list[Record] = list(rows)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: not valid CSV ({error})") from None
    _check_separator(path, rows.fieldnames or [])
    _refuse_twice(path, rows.fieldnames or [])
    for number, record in enumerate(records, start=1):
        if None in record:
            raise DataError(
                f"{path}, record {number}: more fields than the header has; the first line must "
                f"name the columns, and fields with commas need quotes"
            )
    return records


def _refuse_twice(path: Path, columns: Sequence[str]) -> None:
    """Refuse two columns of one name: which of them is meant cannot be told."""
    if twice := [name for name in columns if list(columns).count(name) > 1]:
        raise DataError(
            f"{path}: {columns.count(twice[0])} columns are called {twice[0]!r}; give each its own "
            "name",
            "two columns of its data file have one name",
        )


def _check_separator(path: Path, columns: Sequence[str]) -> None:
    for separator, name in ((";", "';'"), ("\t", "tabs")):
        if len(columns) == 1 and separator in columns[0]:
            raise DataError(
                f"{path}: the file seems to use {name} as separator; save it with commas, and with "
                "quotes around fields that hold commas"
            )


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({_first_line(error)})") from None
    _refuse_twice(path, table.column_names)
    rows: list[Record] = table.to_pylist()
    return rows


def _read_directory(path: Path, split: str | None, on_bad_line: BadLine) -> list[FileRecords]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return [FileRecords("", _read_saved_dataset(path, split))]
    files = _choose_files(path, split)
    return [FileRecords(file.name, _read_file(file, on_bad_line)) for file in files]


def _choose_files(path: Path, split: str | None) -> list[Path]:
    """The record files of a split; refuses a directory in which it is unclear which those are."""
    everything = sorted(file for file in path.iterdir() if file.is_file())
    if unread := [file for file in everything if file.suffix.lower() in _UNREAD]:
        raise DataError(
            f"{path}: {_names(unread)} cannot be read; convert to one of: {FORMATS}, or move it "
            "elsewhere"
        )
    files = [file for file in everything if _extension(file) and file.name not in _NO_RECORDS]
    if not files:
        raise DataError(f"{path}: no record file in this directory; give one of: {FORMATS}")
    of_split = [file for file in files if split and _names_split(file, split)]
    unnamed = [file for file in files if not any(_names_split(file, name) for name in _SPLITS)]
    unnamed = [file for file in unnamed if file not in of_split]
    if of_split and unnamed:
        raise DataError(
            f"{path}: {_names(of_split)} is named after the split {split!r}, but {_names(unnamed)} "
            f"after none; put the split into every name, as {split}-2.jsonl, or give one file"
        )
    if split not in (None, "train") and not of_split:
        raise DataError(
            f"{path}: no file is named after the split {split!r}; there are: {_names(files)}"
        )
    if split is None:
        return files
    if not (chosen := of_split or unnamed):
        raise DataError(
            f"{path}: every file is named after another split than {split!r}: {_names(files)}"
        )
    return chosen


def _names_split(file: Path, split: str) -> bool:
    """Whether a file is named after the split: train.jsonl, train-00000-of-00002.parquet."""
    return re.search(rf"(^|[-_.]){re.escape(split)}([-_.]|$)", file.name) is not None


def _names(files: list[Path]) -> str:
    more = ", ..." if len(files) > _NAMED else ""
    return ", ".join(file.name for file in files[:_NAMED]) + more


def _read_saved_dataset(path: Path, split: str | None) -> list[Record]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and pyarrow raise many kinds; all mean the same here
        raise DataError(f"{path}: not a readable saved data set ({_first_line(error)})") from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(
                f"{path}: has no split {split!r}; it has: {', '.join(saved)}. Choose with "
                f"data.split or data.eval_split"
            )
        saved = saved[split]
    rows: list[Record] = saved.to_list()
    return rows


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
