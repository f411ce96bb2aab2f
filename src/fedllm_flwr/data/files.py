"""Reading record files: json, jsonl, csv, parquet, arrow directories and folders of those."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedllm_flwr.errors import DataError

Record = dict[str, Any]
BadLine = Callable[[str], None]

TEXT_FORMATS = (".json", ".jsonl", ".csv")
FORMATS = "json, jsonl, csv (each also as .gz), parquet, or a directory saved by datasets"


def refuse(message: str) -> None:
    """The default answer to a bad line: raise it."""
    raise DataError(message)


def read_records(
    path: Path, split: str | None = None, on_bad_line: BadLine = refuse
) -> list[Record]:
    """All records of a file or directory, in file order.

    ``split`` chooses among the splits of a directory (one without a file named after "train" is
    all training data); files ignore it. ``on_bad_line`` receives
    one message per broken JSON line; what it does not raise is left out. Raises DataError with
    file, place and remedy for anything that cannot be read.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or directory (working directory {Path.cwd()})")
    records = (
        _read_directory(path, split, on_bad_line)
        if path.is_dir()
        else _read_file(path, on_bad_line)
    )
    if not records:
        raise DataError(f"{path}: holds no records; give a file with at least one")
    return records


def _read_file(path: Path, on_bad_line: BadLine) -> list[Record]:
    """Dispatch on the extension; '.gz' on top of a text format is undone first."""
    extension = _extension(path)
    if extension is None:
        raise DataError(f"{path}: unknown extension {path.suffix!r}; give one of: {FORMATS}")
    if extension == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
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
            f"'iconv -f latin1 -t utf-8'"
        ) from None
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _parse_json(path: Path, text: str, on_bad_line: BadLine) -> list[Record]:
    """A JSON list of objects; JSON lines under the name .json are accepted too."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return list(_parse_lines(path, text, on_bad_line))
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}). "
            f"Fix the file; records one per line belong in a .jsonl file"
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
            record = json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"not valid JSON ({error.msg} at column {error.colno})"
            on_bad_line(f"{path.name}, line {number}: {reason}. {remedy}")
            continue
        if isinstance(record, dict):
            yield record
        else:
            reason = f"a JSON {_json_type(record)}, not an object with columns"
            on_bad_line(f"{path.name}, line {number}: {reason}. {remedy}")


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
    for number, record in enumerate(records, start=1):
        if None in record:
            raise DataError(
                f"{path}, record {number}: more fields than the header has; the first line must "
                f"name the columns, and fields with commas need quotes"
            )
    return records


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({_first_line(error)})") from None
    rows: list[Record] = table.to_pylist()
    return rows


def _read_directory(path: Path, split: str | None, on_bad_line: BadLine) -> list[Record]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _read_saved_dataset(path, split)
    files = sorted(file for file in path.iterdir() if file.is_file() and _extension(file))
    if not files:
        raise DataError(f"{path}: no record file in this directory; give one of: {FORMATS}")
    of_split = [file for file in files if split and _names_split(file, split)]
    if split not in (None, "train") and not of_split:
        names = ", ".join(file.name for file in files[:10])
        raise DataError(f"{path}: no file is named after the split {split!r}; there are: {names}")
    return [record for file in of_split or files for record in _read_file(file, on_bad_line)]


def _names_split(file: Path, split: str) -> bool:
    """Whether a file is named after the split: train.jsonl, train-00000-of-00002.parquet."""
    return re.search(rf"(^|[-_.]){re.escape(split)}([-_.]|$)", file.name) is not None


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
