"""Where records come from: local files, hub data sets and the data embedded in the package."""

from dataclasses import dataclass
from pathlib import Path

from fedllm_flwr.config.schema import DataConfig
from fedllm_flwr.data.files import Record, read_records
from fedllm_flwr.data.preprocessing import PREPROCESSING
from fedllm_flwr.data.records import (
    AttributeColumn,
    Example,
    Mapping,
    make_examples,
    refuse_faults,
    unused_columns,
)
from fedllm_flwr.errors import ConfigError, DataError

DEMO = Path(__file__).parents[1] / "assets" / "demo"


@dataclass(frozen=True)
class SourceReport:
    """What became of the records of one source: read = usable + everything left out."""

    source: str
    read: int
    usable: int
    empty: int  # left out: no instruction or no answer
    bad: int  # left out: not text, a broken line, or a broken chat
    duplicates: int  # left out by the preprocessing
    unscored: int  # usable, but the answer is none of data.labels (0 without a label set)
    unused_columns: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """Examples of one source, in its order."""

    examples: list[Example]
    report: SourceReport


def load_records(
    data: DataConfig,
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
    examples, faults = make_examples(preprocessed, mapping)
    if data.on_bad_record == "error":
        refuse_faults(source, len(rows), faults)
    if not examples:
        raise DataError(f"{source}: none of its {len(rows)} records is usable; check {key}")
    report = SourceReport(
        source=source,
        read=len(rows) + broken_lines,
        usable=len(examples),
        empty=len(faults.empty),
        bad=len(faults.bad) + broken_lines,
        duplicates=sum(row is None for row in preprocessed),
        unscored=sum(example.choice < 0 for example in examples) if data.labels else 0,
        unused_columns=tuple(unused_columns(preprocessed, mapping)),
    )
    return Loaded(examples, report)


def _read(data: DataConfig, evaluation: bool) -> tuple[list[Record], str, int]:
    """Raw records, the source's name for messages, and the number of broken lines left out."""
    path, split = (data.eval_path, data.eval_split) if evaluation else (data.path, data.split)
    if path is None and evaluation:
        path = data.path  # the embedded data, or a directory with several splits
    if path is None:
        return _load_hub(data, split or data.split)
    key = "data.eval_path" if evaluation and data.eval_path is not None else "data.path"
    file = _demo_file(evaluation) if path == "embedded" else Path(path).expanduser()
    broken: list[str] = []
    try:
        if data.on_bad_record == "skip":
            rows = read_records(file, split, on_bad_line=broken.append)
        else:
            rows = read_records(file, split)
    except DataError as error:
        raise DataError(f"{key}: {error}") from None
    return rows, f"{key}={path}", len(broken)


def _demo_file(evaluation: bool) -> Path:
    return DEMO / ("test.jsonl" if evaluation else "train.jsonl")


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
