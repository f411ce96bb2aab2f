"""The training and evaluation records of a run, sampled and split by the run's seed."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.config.schema import EMBEDDED_DATA, Config, DataConfig
from fedllm_flwr.data.columns import AttributeColumn
from fedllm_flwr.data.kinds import RecordKind
from fedllm_flwr.data.overlap import near_duplicates, text_of
from fedllm_flwr.data.record_files import open_records, refuse
from fedllm_flwr.data.remembered import cache_dir, remembered
from fedllm_flwr.data.sources import Records, Scan, Source, SourceReport, open_source, scanned
from fedllm_flwr.errors import DataError
from fedllm_flwr.params import derive_seed

logger = logging.getLogger(__name__)

Positions = NDArray[np.int64]  # ascending indices into the usable records of a source


@dataclass(frozen=True)
class LoadReport:
    """Training and evaluation records of a run."""

    train: SourceReport
    evaluation: SourceReport | None  # None: no evaluation source; see held_out
    num_train: int
    num_eval: int
    held_out: int  # usable training records that became evaluation records
    near: int = 0  # usable training records left out as near duplicates

    def lines(self) -> list[str]:
        """The report as text, one line per source."""
        described = [_describe(self.train, self.num_train, self.held_out, self.near)]
        if self.evaluation is not None:
            described.append(_describe(self.evaluation, self.num_eval))
        return described


@dataclass(frozen=True)
class FederatedData:
    """Records of a run before partitioning; the held-out records are in memory.

    Both have the fields messages (list of {role, content}), label (str), client (str: the value of
    partition.column, otherwise of data.client_column, otherwise "") and those of the task's
    `RecordKind`.
    """

    train: Records
    eval: Records
    report: LoadReport


def load_federated_data(config: Config, kind: RecordKind) -> FederatedData:
    """Load the data of ``config.data``; the same seed gives the same records in the same order.

    Raises:
        DataError: the files or their contents are unusable.
        ConfigError: the options contradict each other or the data.
    """
    data, folder = config.data, cache_dir() / "records"
    source, client = _training_source(config, kind)
    scan = scanned(source, folder)
    chosen = _sample(scan.report.usable, data.max_samples, config.seed, "max_samples")
    before = len(chosen)
    if data.near_duplicates == "drop":
        chosen = _apart(source, scan, chosen, _test_texts(data), folder)
    if has_eval_source(data):
        test, report, num_held = *_load_evaluation(config, kind, client), 0
    else:
        chosen, held = _hold_out(chosen, data, config.seed)
        test = source.records(scan, held, folder).held(kind.record, folder)
        report, num_held = None, len(held)
    if data.near_duplicates == "drop":
        chosen = _apart(source, scan, chosen, [text_of(record) for record in test], folder)
    near = before - len(chosen) - num_held
    counts = LoadReport(scan.report, report, len(chosen), len(test), num_held, near)
    return FederatedData(source.records(scan, chosen, folder), test, counts)


def _apart(
    source: Source, scan: Scan, chosen: Positions, texts: Sequence[str], folder: Path
) -> Positions:
    """The chosen records without exact and near duplicates of `texts`; cached in `folder`.

    Raises:
        DataError: none is left.
    """
    if not texts:
        return chosen
    records = source.records(scan, chosen, folder)
    what = ("near", records.identity, sha256(repr(texts).encode()).hexdigest())
    found, _ = remembered(what, lambda: ({"near": near_duplicates(records, texts)}, None), folder)
    left: Positions = chosen[~found["near"]]
    if not len(left):
        raise DataError(
            f"data.near_duplicates=drop leaves none of {len(chosen)} training records: all are "
            "nearly held-out or test records; give other records"
        )
    return left


def _test_texts(data: DataConfig) -> list[str]:
    """One text for each record of ``data.test_path``, whatever its fields are."""
    if data.test_path is None:
        return []
    try:
        files = open_records(Path(data.test_path).expanduser())
        return [" ".join(_strings(row)) for file in files for row in file.read(refuse)]
    except DataError as error:
        raise DataError(f"data.test_path: {error}") from None


def _strings(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def load_unused_data(config: Config, kind: RecordKind) -> Records:
    """The usable training records that ``data.max_samples`` leaves out, drawn by the seed."""
    source, folder = _training_source(config, kind)[0], cache_dir() / "records"
    scan = scanned(source, folder)
    count = scan.report.usable
    chosen = _sample(count, config.data.max_samples, config.seed, "max_samples")
    return source.records(scan, np.setdiff1d(np.arange(count), chosen), folder)


def _training_source(config: Config, kind: RecordKind) -> tuple[Source, AttributeColumn | None]:
    """A simulation's training source, and its client column."""
    data = config.data
    label = _column(data.columns.label, "data.columns.label", required=True)
    client = _column(data.client_column, "data.client_column", required=True)
    if config.partition.column is not None:
        client = _column(config.partition.column, "partition.column", required=True)
    return open_source(data, kind, label=label, client=client), client


def load_evaluation_data(config: Config, kind: RecordKind) -> Records | None:
    """The server's evaluation records in a deployment, if it has any."""
    if not has_eval_source(config.data):
        return None
    client = _column(config.data.client_column, "data.client_column", required=False)
    return _load_evaluation(config, kind, client)[0]


def _load_evaluation(
    config: Config, kind: RecordKind, client: AttributeColumn | None
) -> tuple[Records, SourceReport]:
    data, folder = config.data, cache_dir() / "records"
    label = _column((data.eval_columns or data.columns).label, "data.columns.label", required=False)
    client = client and replace(client, required=False)
    source = open_source(data, kind, evaluation=True, label=label, client=client)
    scan = scanned(source, folder)
    count = scan.report.usable
    chosen = _sample(count, data.eval_max_samples, config.seed, "eval_max_samples")
    return source.records(scan, chosen, folder).held(kind.record, folder), scan.report


def site_source(config: Config, kind: RecordKind) -> Source:
    """The data file of one site. As a site is one client, label and client columns are optional."""
    label = _column(config.data.columns.label, "data.columns.label", required=False)
    client = _column(config.data.client_column, "data.client_column", required=False)
    return open_source(config.data, kind, label=label, client=client)


def load_site_data(config: Config, kind: RecordKind) -> Records:
    """The training records of a site's own file; fields as in FederatedData."""
    source = site_source(config, kind)
    scan = source.scan()
    chosen = _sample(scan.report.usable, config.data.max_samples, config.seed, "max_samples")
    logger.info("%s", _describe(scan.report, len(chosen)))
    return source.records(scan, chosen)


def _column(name: str | None, key: str, required: bool) -> AttributeColumn | None:
    return None if name is None else AttributeColumn(name, key, required)


def has_eval_source(data: DataConfig) -> bool:
    """Whether evaluation records come from a separate source."""
    if data.eval_path is not None or data.path in EMBEDDED_DATA:
        return True
    if data.eval_split is None:
        return False
    # A single training file has no splits, even if the preset names one of the hub's version.
    return data.path is None or Path(data.path).expanduser().is_dir()


def _hold_out(positions: Positions, data: DataConfig, seed: int) -> tuple[Positions, Positions]:
    """Hold out a seeded part, at most eval_max_samples; both parts keep the order."""
    count = round(len(positions) * data.validation_fraction)
    if data.validation_fraction > 0:
        count = min(max(count, 1), data.eval_max_samples or count)
    if count >= len(positions):
        raise DataError(
            f"{len(positions)} usable training record(s) leave nothing to train on after holding "
            f"out data.validation_fraction={data.validation_fraction}; set it to 0"
        )
    is_held = np.zeros(len(positions), np.bool_)
    is_held[_generator(seed, "validation").permutation(len(positions))[:count]] = True
    return positions[~is_held], positions[is_held]


def _sample(count: int, limit: int | None, seed: int, purpose: str) -> Positions:
    """Positions of a seeded sample of at most ``limit`` out of `count` records."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(_generator(seed, purpose).permutation(count)[:limit])


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, "data", purpose))


def _describe(report: SourceReport, used: int, held_out: int = 0, near: int = 0) -> str:
    counts = {
        "usable": report.usable,
        "used": used,
        "held out for evaluation": held_out,
        "near to a held-out or test record": near,
        "empty": report.empty,
        "equal": report.equal,
        "bad": report.bad,
        "duplicate": report.duplicates,
        "without a known label": report.unscored,
    }
    parts = [f"{count} {name}" for name, count in counts.items() if count or name == "used"]
    unused = f"; columns not used: {', '.join(report.unused_columns)}"
    text = f"{report.source}: {report.read} records, {', '.join(parts)}"
    if report.left_out:
        more = ", ..." if report.empty + report.bad > len(report.left_out) else ""
        text += f" (empty or bad: {', '.join(report.left_out)}{more})"
    return text + unused if report.unused_columns else text
