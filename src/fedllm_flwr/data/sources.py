"""Where records come from: local files, hub data sets and the data embedded in the package."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedllm_flwr.config.schema import EMBEDDED_DATA, DataConfig
from fedllm_flwr.data.columns import AttributeColumn, Mapping, unused_columns, used_columns
from fedllm_flwr.data.faults import NAMED_IN_ERRORS, Faults, refuse_faults
from fedllm_flwr.data.files import FileRecords, Record, read_parts
from fedllm_flwr.data.kinds import RecordKind
from fedllm_flwr.data.preprocessing import Preprocessed
from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.plugins import PREPROCESSING

DEMO = Path(__file__).parents[1] / "assets" / "demo"
_EMBEDDED_FILES = dict(zip(EMBEDDED_DATA, ("{}.jsonl", "preferences_{}.jsonl"), strict=True))


@dataclass(frozen=True)
class SourceReport:
    """What became of the records of one source: read = usable + everything left out."""

    source: str
    read: int
    usable: int
    empty: int  # left out: no instruction, prompt or answer
    equal: int  # left out: the chosen answer equals the rejected one
    bad: int  # left out: not text, a broken line, or a broken chat
    duplicates: int  # left out by the preprocessing
    unscored: int  # usable, but the answer is none of data.labels (0 without a label set)
    unused_columns: tuple[str, ...]
    left_out: tuple[str, ...] = ()  # where the first empty and bad ones are
    used_columns: tuple[str, ...] = ()  # role=column


@dataclass(frozen=True)
class Loaded:
    """Records of one source, in its order: of the type that their kind makes."""

    records: list[Any]
    report: SourceReport


def load_records(
    data: DataConfig,
    kind: RecordKind,
    evaluation: bool = False,
    label: AttributeColumn | None = None,
    client: AttributeColumn | None = None,
) -> Loaded:
    """Read, preprocess and normalise the training (or evaluation) records of a data set.

    Raises DataError for what the files hold and ConfigError for options that cannot work.
    """
    parts, source, broken_lines = _read(data, evaluation)
    own_columns = evaluation and data.eval_columns is not None
    columns = data.eval_columns if own_columns and data.eval_columns else data.columns
    key = "data.eval_columns" if own_columns else "data.columns"
    rows = [row for part in parts for row in part.records]
    preprocessed = PREPROCESSING.find(data.preprocessing)(rows, columns)
    mapping = Mapping(source, columns, key, label, client, data.labels)
    records, faults = _make(preprocessed, parts, mapping, kind, data.on_bad_record == "error")
    if not records:
        raise _none_usable(mapping, len(rows), faults)
    left_out = [f"record {number}" for number, _ in sorted(faults.empty + faults.bad)]
    report = SourceReport(
        source=source,
        read=len(rows) + len(broken_lines),
        usable=len(records),
        empty=len(faults.empty),
        equal=len(faults.equal),
        bad=len(faults.bad) + len(broken_lines),
        duplicates=sum(row is None for row in preprocessed),
        unscored=kind.count_unscored(records) if data.labels else 0,
        unused_columns=tuple(unused_columns(preprocessed, mapping, kind.roles)),
        used_columns=tuple(used_columns(preprocessed, mapping, kind.roles)),
        left_out=tuple([*broken_lines, *left_out][:NAMED_IN_ERRORS]),
    )
    return Loaded(records, report)


def _make(
    rows: Preprocessed,
    parts: list[FileRecords],
    mapping: Mapping,
    kind: RecordKind,
    refuse_bad: bool,
) -> tuple[list[Any], Faults]:
    """Usable records and faults of all files; each file must have the columns by itself.

    `rows` are those of the `parts`, one after the other. Faults number them through.
    """
    records: list[Any] = []
    faults, start = Faults(), 0
    for part in parts:
        mine = rows[start : start + len(part.records)]
        where = f"{mapping.source}/{part.name}" if part.name else mapping.source
        if any(row is not None for row in mine):
            made, found = kind.make(mine, replace(mapping, source=where))
            if refuse_bad:
                refuse_faults(where, len(mine), found, kind.refused)
            records += made
            faults.extend(found, start)
        start += len(mine)
    return records, faults


def _none_usable(mapping: Mapping, num_records: int, faults: Faults) -> DataError:
    key = mapping.columns_key
    if len(faults.equal) == num_records:
        return DataError(
            f"{mapping.source}: chosen equals rejected in all {num_records} records; check "
            f"{key}.chosen and {key}.rejected"
        )
    found = sorted(faults.empty + faults.equal + faults.bad)
    first = f" (record {found[0][0]}: {found[0][1]})" if found else ""
    return DataError(
        f"{mapping.source}: none of its {num_records} records is usable{first}; check {key}",
        "none of its records is usable",
    )


def _read(data: DataConfig, evaluation: bool) -> tuple[list[FileRecords], str, list[str]]:
    """Raw records by file, the source's name for messages, and where broken lines were left out."""
    path, split = (data.eval_path, data.eval_split) if evaluation else (data.path, data.split)
    if path is None and evaluation:
        path = data.path  # the embedded data, or a directory with several splits
    if path is None:
        return _load_hub(data, split or data.split)
    key = "data.eval_path" if evaluation and data.eval_path is not None else "data.path"
    if path in EMBEDDED_DATA:
        file = DEMO / _EMBEDDED_FILES[path].format("test" if evaluation else "train")
    else:
        file = Path(path).expanduser()
    broken: list[str] = []
    try:
        if data.on_bad_record == "skip":
            parts = read_parts(file, split, on_bad_line=broken.append)
        else:
            parts = read_parts(file, split)
    except DataError as error:
        raise DataError(f"{key}: {error}", error.shareable) from None
    return parts, f"{key}={path}", [message.partition(":")[0] for message in broken]


def _load_hub(data: DataConfig, split: str) -> tuple[list[FileRecords], str, list[str]]:
    if data.hub_id is None:
        raise ConfigError(
            "data.path is not set, and neither is data.hub_id; give data.path=/path/to/file"
        )
    import datasets

    source = f"data.hub_id={data.hub_id} (split {split})"
    try:
        loaded = datasets.load_dataset(
            data.hub_id, data.hub_config, split=split, revision=data.hub_revision
        )
    except ConnectionError:
        raise DataError(
            f"data set {data.hub_id} is not on this machine and the hub cannot be reached; give "
            f"data.path=/path/to/file with its records (columns as in data={data.name}), or "
            f"download it once on a connected machine"
        ) from None
    except Exception as error:  # datasets raises many kinds; all mean that the set is unusable
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise DataError(f"{source}: cannot be loaded ({reason})") from None
    rows: list[Record] = loaded.to_list()
    return [FileRecords("", rows)], source, []
