"""Sources of records: local files, hub data sets and the data embedded in the package."""

import json
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr import __version__
from fedllm_flwr.config.schema import EMBEDDED_DATA, DataConfig
from fedllm_flwr.data import columns as roles
from fedllm_flwr.data.columns import AttributeColumn, Columns
from fedllm_flwr.data.faults import NAMED_IN_ERRORS, Faults, refuse_faults
from fedllm_flwr.data.kinds import RecordKind
from fedllm_flwr.data.record_files import (
    BadLine,
    Record,
    RecordFile,
    open_records,
    read_dataset,
    refuse,
)
from fedllm_flwr.data.remembered import (
    Arrays,
    Stamps,
    cache_dir,
    code_digest,
    path_digest,
    remembered,
    stamps,
)
from fedllm_flwr.errors import ConfigError, DataError, first_line
from fedllm_flwr.plugins import PREPROCESSING

DEMO = Path(__file__).parents[1] / "assets" / "demo"
_EMBEDDED_FILES = dict(zip(EMBEDDED_DATA, ("{}.jsonl", "preferences_{}.jsonl"), strict=True))
_BATCH = 1000  # records


@dataclass(frozen=True)
class SourceReport:
    """Counts of one source's records: read = usable + all that were left out."""

    source: str
    read: int
    usable: int
    empty: int  # left out: no instruction, prompt or answer
    equal: int  # left out: the chosen answer equals the rejected one
    bad: int  # left out: not text, a broken line, or a broken chat
    duplicates: int  # left out by the preprocessing
    unscored: int  # usable, but the answer is none of data.labels (0 without a label set)
    unused_columns: tuple[str, ...]
    left_out: tuple[str, ...] = ()  # positions of the first empty and bad records
    used_columns: tuple[str, ...] = ()  # role=column


class Records:
    """Records of one kind, in order; iterating over them reads their texts from the source.

    Attributes:
        column_names: fields of a record.
        identity: digest of the content; equal identities mean equal records. "": unknown.
        characters: number of characters of each record's texts, shape (num_records,).
    """

    def __init__(
        self,
        column_names: tuple[str, ...],
        identity: str,
        characters: NDArray[np.int64],
        attributes: Mapping[str, list[Any]],
        read: Callable[[], Iterator[Any]],
    ) -> None:
        self.column_names = column_names
        self.identity = identity
        self.characters = characters
        self._attributes = attributes
        self._read = read

    def __len__(self) -> int:
        return len(self.characters)

    def __iter__(self) -> Iterator[Any]:
        return self._read()

    def __getitem__(self, field: str) -> list[Any]:
        """The values of a field; labels, clients and numbers are known without reading."""
        if field in self._attributes:
            return self._attributes[field]
        return [getattr(record, field) for record in self]

    @classmethod
    def of(cls, rows: Sequence[Any], identity: str = "") -> "Records":
        """Records from memory; at least one."""
        characters = np.array([sum(map(len, texts_of(row))) for row in rows], np.int64)
        return cls(rows[0]._fields if rows else (), identity, characters, {}, lambda: iter(rows))

    def held(self, make: Callable[..., Any], folder: Path) -> "Records":
        """The same records in memory, read once and then cached in `folder`.

        Args:
            make: the type of a record.
        """
        _, rows = remembered(("records", self.identity), lambda: ({}, list(self)), folder)
        records = [make(*row) for row in rows]
        return Records(
            self.column_names, self.identity, self.characters, self._attributes, records.__iter__
        )


def texts_of(record: Any) -> Iterator[str]:
    """All texts of a record: its turns, and its separate answers."""
    for field, value in zip(record._fields, record, strict=True):
        if field == "messages":
            yield from (turn["content"] for turn in value)
        elif isinstance(value, str) and field not in ("label", "client"):
            yield value


def records_digest(records: Records, folder: Path | None = None) -> str:
    """SHA-256 of the records in their order, in hexadecimal, whatever the format of the file.

    Args:
        folder: folder that keeps the digest between processes; None: the user's cache.
    """

    def make() -> tuple[Arrays, str]:
        digest = sha256()
        for batch in _batches(records):
            columns = dict(
                zip(records.column_names, map(list, zip(*batch, strict=True)), strict=True)
            )
            digest.update(json.dumps(columns, sort_keys=True).encode())
        return {}, digest.hexdigest()

    what = ("digest", records.identity)
    return str(remembered(what, make, folder or cache_dir() / "records")[1])


def _batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    ahead = iter(rows)
    while batch := list(islice(ahead, _BATCH)):
        yield batch


@dataclass(frozen=True)
class Scan:
    """Facts about a source from one pass over it: everything except the texts."""

    report: SourceReport
    numbers: NDArray[np.int64]  # indices of the usable records among all records read
    characters: NDArray[np.int64]  # number of characters of each usable record's texts
    attributes: dict[str, NDArray[np.int32]]  # per usable record; texts as indices into names
    names: dict[str, list[str]]  # distinct values of the text attributes

    def pack(self) -> tuple[Arrays, dict[str, Any]]:
        """Convert to arrays and a JSON value."""
        arrays: Arrays = {"numbers": self.numbers, "characters": self.characters}
        arrays |= self.attributes
        return arrays, {"report": asdict(self.report), "names": self.names}

    @classmethod
    def unpack(cls, arrays: Arrays, facts: dict[str, Any]) -> "Scan":
        """The inverse of `pack`."""
        lists = {"unused_columns", "left_out", "used_columns"}
        report: dict[str, Any] = facts["report"]
        report |= {name: tuple(report[name]) for name in lists}
        numbers, characters = arrays.pop("numbers"), arrays.pop("characters")
        return cls(SourceReport(**report), numbers, characters, arrays, facts["names"])

    def values(self, attribute: str, positions: NDArray[np.int64]) -> list[Any]:
        """The values of an attribute for the usable records at `positions`."""
        values: NDArray[Any] = self.attributes[attribute][positions]
        if attribute in self.names:
            values = np.array(self.names[attribute], object)[values]
        return list(values.tolist())


@dataclass(frozen=True)
class Source:
    """A file, a directory or a hub data set, and how its records are read."""

    files: list[RecordFile]
    path: Path | None  # None: a hub data set
    stamps: Stamps  # of the files when the source was opened
    key: str  # configuration key of the path
    fingerprint: str  # of a hub data set
    settings: DataConfig
    mapping: roles.Mapping
    kind: RecordKind

    def identity(self, folder: Path | None = None) -> str:
        """Digest of the content and of every setting that affects the records.

        Args:
            folder: folder that keeps file digests between processes; None: they are not kept.
        """
        content = path_digest(self.path, folder) if self.path else self.fingerprint
        settings, mapping = self.settings, replace(self.mapping, source="")
        made_by = PREPROCESSING.find(settings.preprocessing), self.kind.make
        parts = [__version__, *map(code_digest, made_by), content, mapping]
        parts += [[file.name for file in self.files], settings.preprocessing]
        parts.append(settings.on_bad_record)
        return sha256(repr(parts).encode()).hexdigest()

    def records(
        self, scan: Scan, positions: NDArray[np.int64], folder: Path | None = None
    ) -> Records:
        """The usable records at the given positions, which are ascending.

        Args:
            folder: as for `identity`.
        """
        return Records(
            self.kind.record._fields,
            sha256(self.identity(folder).encode() + positions.tobytes()).hexdigest(),
            scan.characters[positions],
            {name: scan.values(name, positions) for name in scan.attributes},
            partial(self.read, scan.numbers[positions]),
        )

    def scan(self) -> Scan:
        """Read all records once.

        Raises:
            DataError: the files cannot be read, contain no usable record, or contain a record that
                ``data.on_bad_record`` does not accept.
        """
        kind, refuse_bad = self.kind, self.settings.on_bad_record == "error"
        broken: list[str] = []
        numbers, characters = array("q"), array("q")
        attributes: dict[str, array[int]] = {}
        names: dict[str, dict[str, int]] = {"label": {}, "client": {}}
        present, faults, read, duplicates = Columns(), Faults(), 0, 0
        for mapping, columns, batches in self._parts(refuse if refuse_bad else broken.append):
            before, of_part = read, Faults()
            for batch in batches:
                made, found = self._make(batch, mapping, columns)
                unusable = {number for number, _ in (*found.empty, *found.bad, *found.equal)}
                for number, row in enumerate(batch, start=1):
                    present.include(row)
                    if row is not None and number not in unusable:
                        numbers.append(read + number - 1)
                for record in made:
                    characters.append(sum(map(len, texts_of(record))))
                    for field, value in zip(record._fields, record, strict=True):
                        known = names.get(field)
                        number = value if known is None else known.setdefault(value, len(known))
                        if isinstance(number, int):
                            attributes.setdefault(field, array("i")).append(number)
                of_part.extend(found, read - before)
                duplicates += batch.count(None)
                read += len(batch)
            if refuse_bad:
                refuse_faults(mapping.source, read - before, of_part, kind.refused)
            faults.extend(of_part, before)
        self._require_unchanged()
        if not read and self.path:
            raise DataError(
                f"{self.key}: {self.path}: holds no records; give a file with at least one",
                "its data file is empty",
            )
        if not characters:
            raise self._none_usable(read, faults)
        left_out = [f"record {number}" for number, _ in sorted(faults.empty + faults.bad)]
        places = [message.partition(":")[0] for message in broken]
        has_choice = bool(self.mapping.labels) and "choice" in attributes
        report = SourceReport(
            source=self.mapping.source,
            read=read + len(broken),
            usable=len(characters),
            empty=len(faults.empty),
            equal=len(faults.equal),
            bad=len(faults.bad) + len(broken),
            duplicates=duplicates,
            unscored=sum(choice < 0 for choice in attributes["choice"]) if has_choice else 0,
            unused_columns=tuple(roles.unused_columns(present, self.mapping, kind.roles)),
            used_columns=tuple(roles.used_columns(present, self.mapping, kind.roles)),
            left_out=tuple([*places, *left_out][:NAMED_IN_ERRORS]),
        )
        return Scan(
            report,
            np.array(numbers, np.int64),
            np.array(characters, np.int64),
            {name: np.array(values, np.int32) for name, values in attributes.items()},
            {name: list(values) for name, values in names.items()},
        )

    def read(self, numbers: NDArray[np.int64]) -> Iterator[Any]:
        """Read the records with the given numbers, which are ascending and usable."""
        start = done = 0
        for mapping, columns, batches in self._parts(lambda _: None):
            for batch in batches:
                end = int(np.searchsorted(numbers, start + len(batch)))
                chosen = [batch[number - start] for number in numbers[done:end].tolist()]
                yield from self._make(chosen, mapping, columns)[0]
                start, done = start + len(batch), end
                if done == len(numbers):
                    self._require_unchanged()
                    return

    def _parts(
        self, on_bad_line: BadLine
    ) -> Iterator[tuple[roles.Mapping, Columns, Iterator[list[Record | None]]]]:
        """For each file, its column mapping, its columns, and its preprocessed records."""
        preprocessing = PREPROCESSING.find(self.settings.preprocessing)
        prepare = partial(preprocessing, columns=self.mapping.columns)
        mapped = roles.mapped_columns(self.mapping, self.kind.roles)
        # The default name may be missing: most data sets without extra input have no such column.
        wanted = {name for role, name in mapped.items() if (role, name) != ("input", "input")}
        origins: deque[RecordFile] = deque()  # files of the records being preprocessed

        def read() -> Iterator[Record]:
            for file in self.files:
                for row in self._rows(file, on_bad_line):
                    origins.append(file)
                    yield row

        for file, rows in groupby(prepare(read()), key=lambda _: origins.popleft()):
            present = Columns()
            for row in prepare(self._rows(file, lambda _: None)):
                present.include(row)
                if wanted <= present:
                    break
            name = f"{self.mapping.source}/{file.name}" if file.name else self.mapping.source
            yield replace(self.mapping, source=name), present, _batches(rows)

    def _rows(self, file: RecordFile, on_bad_line: BadLine) -> Iterator[Record]:
        try:
            yield from file.read(on_bad_line)
        except DataError as error:
            raise DataError(f"{self.key}: {error}", error.shareable) from None

    def _make(
        self, rows: list[Record | None], mapping: roles.Mapping, columns: Columns
    ) -> tuple[list[Any], Faults]:
        if not any(row is not None for row in rows):
            return [], Faults()
        return self.kind.make(rows, mapping, columns)

    def _require_unchanged(self) -> None:
        if self.path and stamps(self.path) != self.stamps:
            raise DataError(
                f"{self.key}: {self.path}: has changed while it was read; start again when it is "
                "complete",
                "its data file has changed while it was read",
            )

    def _none_usable(self, num_records: int, faults: Faults) -> DataError:
        source, key = self.mapping.source, self.mapping.columns_key
        if len(faults.equal) == num_records:
            return DataError(
                f"{source}: chosen equals rejected in all {num_records} records; check "
                f"{key}.chosen and {key}.rejected"
            )
        found = sorted(faults.empty + faults.equal + faults.bad)
        first = f" (record {found[0][0]}: {found[0][1]})" if found else ""
        return DataError(
            f"{source}: none of its {num_records} records is usable{first}; check {key}",
            "none of its records is usable",
        )


def open_source(
    data: DataConfig,
    kind: RecordKind,
    evaluation: bool = False,
    label: AttributeColumn | None = None,
    client: AttributeColumn | None = None,
) -> Source:
    """The configured source of the training or evaluation records.

    Raises:
        DataError: the source does not exist.
        ConfigError: the configuration names none.
    """
    path, split = (data.eval_path, data.eval_split) if evaluation else (data.path, data.split)
    if path is None and evaluation:
        path = data.path  # the embedded data, or a directory with several splits
    own_columns = data.eval_columns if evaluation else None
    mapping = roles.Mapping(
        source="",
        columns=own_columns or data.columns,
        columns_key="data.eval_columns" if own_columns else "data.columns",
        label=label,
        client=client,
        labels=data.labels,
    )
    if path is None:
        name, rows = _load_hub(data, split or data.split)
        files = [RecordFile("", partial(read_dataset, rows))]
        mapping = replace(mapping, source=name)
        return Source(files, None, [], "", rows._fingerprint, data, mapping, kind)
    key = "data.eval_path" if evaluation and data.eval_path is not None else "data.path"
    if path in EMBEDDED_DATA:
        place = DEMO / _EMBEDDED_FILES[path].format("test" if evaluation else "train")
    else:
        place = Path(path).expanduser()
    try:
        files = open_records(place, split)
    except DataError as error:
        raise DataError(f"{key}: {error}", error.shareable) from None
    mapping = replace(mapping, source=f"{key}={path}")
    return Source(files, place, stamps(place), key, "", data, mapping, kind)


def scanned(source: Source, folder: Path) -> Scan:
    """A source's scan, read from `folder` if the same content was scanned before."""
    what = ("scan", source.identity(folder))
    scan = Scan.unpack(*remembered(what, lambda: source.scan().pack(), folder))
    return replace(scan, report=replace(scan.report, source=source.mapping.source))


def _load_hub(data: DataConfig, split: str) -> tuple[str, Any]:
    """A hub data set, from the hub or its local cache: its name in messages, and its rows."""
    if data.hub_id is None:
        raise ConfigError(
            "data.path is not set, and neither is data.hub_id; give data.path=/path/to/file"
        )
    import datasets

    source = f"data.hub_id={data.hub_id} (split {split})"
    try:
        return source, datasets.load_dataset(
            data.hub_id, data.hub_config, split=split, revision=data.hub_revision
        )
    except ConnectionError:
        raise DataError(
            f"data set {data.hub_id} is not on this machine and the hub cannot be reached; give "
            f"data.path=/path/to/file with its records (columns as in data={data.name}), or "
            f"download it once on a connected machine"
        ) from None
    except Exception as error:  # datasets raises many kinds; all mean that the set is unusable
        raise DataError(f"{source}: cannot be loaded ({first_line(error)})") from None
