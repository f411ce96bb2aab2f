"""Reading record files: json, jsonl, csv, parquet, arrow directories and folders of those."""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fedllm_flwr.errors import DataError, first_line

if TYPE_CHECKING:
    import datasets

Record = dict[str, Any]
BadLine = Callable[[str], None]

TEXT_FORMATS = (".json", ".jsonl", ".csv")
FORMATS = "json, jsonl, csv (each also as .gz), parquet, or a directory saved by datasets"

_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_UNREAD = (".tsv", ".ndjson", ".arrow", ".feather", ".xls", ".xlsx", ".zip", ".zst", ".bz2", ".xz")
_NO_RECORDS = ("dataset_infos.json",)  # metadata of older hub data sets
_NAMED = 10  # files named in a message
_EMPTY = "its data file is empty"
_FIX_LINE = "Fix the line, or drop bad lines with data.on_bad_record=skip"
_ROWS = 1000  # converted from arrow at a time
_PIECE = 2**20  # characters of a JSON list read at a time


@dataclass(frozen=True)
class RecordFile:
    """The records of one file; each iteration reads the file from the start."""

    name: str  # inside the directory that was opened; "" where a single file was
    read: Callable[[BadLine], Iterator[Record]]
    """Yields the records. The callable gets a message for each broken JSON line; unless it raises,
    the line is skipped. Raises DataError with file, position and remedy for unreadable content."""


def refuse(message: str) -> None:
    """The default handler of a bad line: raise a DataError."""
    raise DataError(message, "a line of its data file is broken")


def open_records(path: Path, split: str | None = None) -> list[RecordFile]:
    """The record files of a path, which is a file or a directory, sorted by name.

    Args:
        split: selects a split of a directory; if no file is named after a split, all files are
            training data. Ignored for single files.

    Raises:
        DataError: the path does not exist, or the record files in it are ambiguous.
    """
    if not path.exists():
        raise DataError(
            f"{path}: no such file or directory (working directory {Path.cwd()})",
            "its data file is missing",
        )
    if not path.is_dir():
        return [RecordFile("", _reader(path))]
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return [RecordFile("", partial(read_dataset, _open_saved(path, split)))]
    return [RecordFile(file.name, _reader(file)) for file in _choose_files(path, split)]


def _reader(path: Path) -> Callable[[BadLine], Iterator[Record]]:
    """Reader of a file, by its extension."""
    extension = _extension(path)
    if extension is None:
        raise DataError(f"{path}: unknown extension {path.suffix!r}; give one of: {FORMATS}")
    readers = {
        ".json": _read_json,
        ".jsonl": _read_lines,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    return partial(readers[extension], path)


def _extension(path: Path) -> str | None:
    """The format's extension without '.gz', or None for an unsupported format."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in TEXT_FORMATS else None
    return suffixes[-1] if suffixes and suffixes[-1] in (*TEXT_FORMATS, ".parquet") else None


@contextmanager
def _opened(path: Path, newline: str | None = "\n") -> Iterator[TextIO]:
    """Open a text file, unzipped if needed; errors while reading it become a DataError."""
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError:
        with opener(path, "rb") as file:
            raise _not_utf8(path, file) from None
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{path}: cannot be read ({error})", "its data file cannot be read"
        ) from None


def _not_utf8(path: Path, file: Any) -> DataError:
    """The error for text that is not UTF-8; the byte order mark or zero bytes give the encoding."""
    place, encoding = 0, ""
    for line in file:
        if not encoding:
            marks = {
                codecs.BOM_UTF32_LE: "utf-32",
                codecs.BOM_UTF32_BE: "utf-32",
                codecs.BOM_UTF16_LE: "utf-16",
                codecs.BOM_UTF16_BE: "utf-16",
            }
            head = line[:1000]
            few = len(head) // 4
            by_zeros = "utf-16be" if head[::2].count(0) > few else "latin1"
            by_zeros = "utf-16le" if head[1::2].count(0) > few else by_zeros
            encoding = next((marks[mark] for mark in marks if line.startswith(mark)), by_zeros)
        try:
            line.decode()
        except UnicodeDecodeError as error:
            place += error.start
            break
        place += len(line)
    return DataError(
        f"{path}: not UTF-8 (byte {place}); convert it, for example with "
        f"'iconv -f {encoding} -t utf-8'"
    )


class _TwiceError(Exception):
    """A JSON object has two values for one name, which is ambiguous."""


def _record(pairs: list[tuple[str, Any]]) -> Record:
    """A JSON object."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return record


_JSON = json.JSONDecoder(object_pairs_hook=_record)
_FIRST = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*(?=\{)")  # precedes the first object of a list
_NEXT = re.compile(r"[ \t\n\r]*,[ \t\n\r]*(?=\{)")  # precedes every other object
_END = re.compile(r"[ \t\n\r]*\][ \t\n\r]*\Z")


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _read_lines(path: Path, on_bad_line: BadLine) -> Iterator[Record]:
    """JSON lines."""
    is_empty = True
    with _opened(path) as file:  # lines end only at \n: U+2028 and its kind are legal in a string
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            is_empty = False
            try:
                record = _JSON.decode(line.removesuffix("\n"))
            except _TwiceError as error:
                reason = f"two values for {str(error)!r}"
            except json.JSONDecodeError as error:
                reason = f"not valid JSON ({error.msg} at column {error.colno})"
            else:
                if isinstance(record, dict):
                    yield record
                    continue
                reason = f"a JSON {_json_type(record)}, not an object with columns"
            on_bad_line(f"{path.name}, line {number}: {reason}. {_FIX_LINE}")
    if is_empty:
        raise DataError(f"{path}: the file is empty", _EMPTY)


def _read_json(path: Path, on_bad_line: BadLine) -> Iterator[Record]:
    """A JSON list of objects, read piece by piece; JSON lines are accepted as well."""
    with _opened(path) as file:
        text, place, before = file.read(_PIECE), 0, _FIRST
        while True:
            found = before.match(text, place)
            try:
                if found:
                    record, place = _JSON.raw_decode(text, found.end())
                    before = _NEXT
                    yield record
                    continue
            except json.JSONDecodeError:
                pass  # the object continues in the next piece, or is broken
            except _TwiceError as error:
                raise _two_values(path, error) from None
            if not (piece := file.read(max(_PIECE, len(text) - place))):
                break
            text, place = text[place:] + piece, 0
    if before is _FIRST or not _END.match(text, place):
        yield from _read_other_json(path, on_bad_line)


def _read_other_json(path: Path, on_bad_line: BadLine) -> Iterator[Record]:
    """JSON lines in a .json file; otherwise raise the error for content that is not a list."""
    with _opened(path) as file:
        text = file.read()
    if not text.strip():
        raise DataError(f"{path}: the file is empty", _EMPTY)
    try:
        content = _JSON.decode(text)
    except _TwiceError as error:
        raise _two_values(path, error) from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            del text
            yield from _read_lines(path, on_bad_line)
            return
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


def _two_values(path: Path, error: _TwiceError) -> DataError:
    return DataError(
        f"{path}: an object has two values for {str(error)!r}; give each its own name",
        "two columns of its data file have one name",
    )


def _read_csv(path: Path, on_bad_line: BadLine) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    with _opened(path, newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            columns = list(rows.fieldnames or [])
            if not columns:
                raise DataError(f"{path}: the file is empty", _EMPTY)
            for separator, name in ((";", "';'"), ("\t", "tabs")):
                if len(columns) == 1 and separator in columns[0]:
                    raise DataError(
                        f"{path}: the file seems to use {name} as separator; save it with commas, "
                        "and with quotes around fields that hold commas"
                    )
            _refuse_twice(path, columns)
            for number, record in enumerate(rows, start=1):
                if None in record:
                    raise DataError(
                        f"{path}, record {number}: more fields than the header has; the first line "
                        "must name the columns, and fields with commas need quotes"
                    )
                yield record
        except csv.Error as error:
            raise DataError(f"{path}, line {rows.line_num}: not valid CSV ({error})") from None


def _refuse_twice(path: Path, columns: Sequence[str]) -> None:
    """Reject two columns with the same name, which are ambiguous."""
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise DataError(
            f"{path}: {columns.count(twice[0])} columns are called {twice[0]!r}; give each its own "
            "name",
            "two columns of its data file have one name",
        )


def _read_parquet(path: Path, on_bad_line: BadLine) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            _refuse_twice(path, file.schema_arrow.names)
            for rows in file.iter_batches(_ROWS):
                yield from rows.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({first_line(error)})") from None


def read_dataset(rows: "datasets.Dataset", on_bad_line: BadLine = refuse) -> Iterator[Record]:
    """The rows of a data set of the datasets library, which memory-maps its files."""
    for table in rows.with_format("arrow").iter(_ROWS):
        yield from table.to_pylist()


def _open_saved(path: Path, split: str | None) -> "datasets.Dataset":
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and pyarrow raise many kinds; all mean the same here
        raise DataError(f"{path}: not a readable saved data set ({first_line(error)})") from None
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise DataError(
            f"{path}: has no split {split!r}; it has: {', '.join(saved)}. Choose with "
            f"data.split or data.eval_split"
        )
    return saved[split]


def _choose_files(path: Path, split: str | None) -> list[Path]:
    """The record files of a split; rejects a directory in which they are ambiguous."""
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
