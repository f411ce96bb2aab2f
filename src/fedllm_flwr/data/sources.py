"""Where records come from: local files, hub data sets and the data embedded in the package."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm_flwr.config.schema import EMBEDDED_DATA, DataConfig
from fedllm_flwr.data.columns import AttributeColumn, Mapping, unused_columns
from fedllm_flwr.data.faults import Faults, refuse_faults
from fedllm_flwr.data.files import Record, read_records
from fedllm_flwr.data.kinds import RecordKind
from fedllm_flwr.data.preprocessing import PREPROCESSING
from fedllm_flwr.errors import ConfigError, DataError

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
    rows, source, broken_lines = _read(data, evaluation)
    own_columns = evaluation and data.eval_columns is not None
    columns = data.eval_columns if own_columns and data.eval_columns else data.columns
    key = "data.eval_columns" if own_columns else "data.columns"
    if data.preprocessing not in PREPROCESSING:
        raise ConfigError(
            f"data.preprocessing={data.preprocessing} is unknown; "
            f"use one of: {', '.join(PREPROCESSING)}"
        )
    preprocessed = PREPROCESSING[data.preprocessing](rows, columns)
    mapping = Mapping(source, columns, key, label, client, data.labels)
    records, faults = kind.make(preprocessed, mapping)
    if data.on_bad_record == "error":
        refuse_faults(source, len(rows), faults, kind.refused)
    if not records:
        raise _none_usable(mapping, len(rows), faults)
    report = SourceReport(
        source=source,
        read=len(rows) + broken_lines,
        usable=len(records),
        empty=len(faults.empty),
        equal=len(faults.equal),
        bad=len(faults.bad) + broken_lines,
        duplicates=sum(row is None for row in preprocessed),
        unscored=kind.count_unscored(records) if data.labels else 0,
        unused_columns=tuple(unused_columns(preprocessed, mapping, kind.roles)),
    )
    return Loaded(records, report)


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
        f"{mapping.source}: none of its {num_records} records is usable{first}; check {key}"
    )


def _read(data: DataConfig, evaluation: bool) -> tuple[list[Record], str, int]:
    """Raw records, the source's name for messages, and the number of broken lines left out."""
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
            rows = read_records(file, split, on_bad_line=broken.append)
        else:
            rows = read_records(file, split)
    except DataError as error:
        raise DataError(f"{key}: {error}") from None
    return rows, f"{key}={path}", len(broken)


def _load_hub(data: DataConfig, split: str) -> tuple[list[Record], str, int]:
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
    return rows, source, 0
