"""The training and evaluation records of a run, sampled and split by the run's seed."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fedllm_flwr.config.schema import EMBEDDED_DATA, Config, DataConfig
from fedllm_flwr.data.columns import AttributeColumn
from fedllm_flwr.data.kinds import RecordKind
from fedllm_flwr.data.sources import SourceReport, load_records
from fedllm_flwr.errors import DataError
from fedllm_flwr.params import derive_seed

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)
Record = TypeVar("Record")


@dataclass(frozen=True)
class LoadReport:
    """What was read, and how it was divided."""

    train: SourceReport
    evaluation: SourceReport | None  # None: no evaluation records, or held out of the training ones
    num_train: int
    num_eval: int
    held_out: int  # usable training records that became evaluation records

    def lines(self) -> list[str]:
        """The report as text, one line per source."""
        described = [_describe(self.train, self.num_train, self.held_out)]
        if self.evaluation is not None:
            described.append(_describe(self.evaluation, self.num_eval))
        return described


@dataclass(frozen=True)
class FederatedData:
    """Records of a run, before they are divided among clients.

    Both sets have the columns messages (list of {role, content}), label (str) and client (str:
    value of partition.column, else of data.client_column, else "") and those of the task, see its
    `RecordKind`.
    """

    train: "datasets.Dataset"
    eval: "datasets.Dataset"
    report: LoadReport


def load_federated_data(config: Config, kind: RecordKind) -> FederatedData:
    """Load what ``config.data`` names; the same seed gives the same records in the same order.

    Raises DataError and ConfigError with key, value and remedy.
    """
    data = config.data
    label = _column(data.columns.label, "data.columns.label", required=True)
    client = _client_column(config)
    loaded = load_records(data, kind, label=label, client=client)
    train = _sample(loaded.records, data.max_samples, config.seed, "max_samples")
    if _has_eval_source(data):
        test, report = _load_evaluation(config, kind, client)
        held_out = 0
    else:
        train, test = _hold_out(train, data, config.seed)
        held_out, report = len(test), None
    counts = LoadReport(loaded.report, report, len(train), len(test), held_out)
    return FederatedData(kind.to_dataset(train), kind.to_dataset(test), counts)


def load_evaluation_data(config: Config, kind: RecordKind) -> "datasets.Dataset | None":
    """The evaluation records of a server whose training data lie with its sites, if it has any."""
    if not _has_eval_source(config.data):
        return None
    client = _column(config.data.client_column, "data.client_column", required=False)
    return kind.to_dataset(_load_evaluation(config, kind, client)[0])


def _load_evaluation(
    config: Config, kind: RecordKind, client: AttributeColumn | None
) -> tuple[list[Any], SourceReport]:
    data = config.data
    loaded = load_records(
        data, kind, True, label=_optional(_eval_label(data)), client=_optional(client)
    )
    records = _sample(loaded.records, data.eval_max_samples, config.seed, "eval_max_samples")
    return records, loaded.report


def load_site_data(config: Config, kind: RecordKind) -> "datasets.Dataset":
    """The training records of one site's own file; columns as in FederatedData.

    The label and client columns may be absent here: a site is one client.
    """
    data = config.data
    label = _column(data.columns.label, "data.columns.label", required=False)
    client = _column(data.client_column, "data.client_column", required=False)
    loaded = load_records(data, kind, label=label, client=client)
    records = _sample(loaded.records, data.max_samples, config.seed, "max_samples")
    logger.info("%s", _describe(loaded.report, len(records)))
    return kind.to_dataset(records)


def _client_column(config: Config) -> AttributeColumn | None:
    if config.partition.column is not None:
        return _column(config.partition.column, "partition.column", required=True)
    return _column(config.data.client_column, "data.client_column", required=True)


def _eval_label(data: DataConfig) -> AttributeColumn | None:
    columns = data.eval_columns or data.columns
    return _column(columns.label, "data.columns.label", required=False)


def _column(name: str | None, key: str, required: bool) -> AttributeColumn | None:
    return None if name is None else AttributeColumn(name, key, required)


def _optional(column: AttributeColumn | None) -> AttributeColumn | None:
    return None if column is None else AttributeColumn(column.name, column.key, required=False)


def _has_eval_source(data: DataConfig) -> bool:
    """Whether evaluation records come from elsewhere than the training records."""
    if data.eval_path is not None or data.path in EMBEDDED_DATA:
        return True
    if data.eval_split is None:
        return False
    # A single training file has no splits, whatever a preset says about the hub's version.
    return data.path is None or Path(data.path).expanduser().is_dir()


def _hold_out(
    records: list[Record], data: DataConfig, seed: int
) -> tuple[list[Record], list[Record]]:
    """A seeded part of the records, at most eval_max_samples; both parts keep the order."""
    count = round(len(records) * data.validation_fraction)
    if data.validation_fraction > 0:
        count = min(max(count, 1), data.eval_max_samples or count)
    if count >= len(records):
        raise DataError(
            f"{len(records)} usable training record(s) leave nothing to train on after holding "
            f"out data.validation_fraction={data.validation_fraction}; set it to 0"
        )
    chosen = set(_generator(seed, "validation").permutation(len(records))[:count].tolist())
    rest = [record for i, record in enumerate(records) if i not in chosen]
    return rest, [record for i, record in enumerate(records) if i in chosen]


def _sample(records: list[Record], limit: int | None, seed: int, purpose: str) -> list[Record]:
    """A seeded sample of at most ``limit`` records, in their order."""
    if limit is None or limit >= len(records):
        return records
    chosen = np.sort(_generator(seed, purpose).permutation(len(records))[:limit])
    return [records[i] for i in chosen]


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, "data", purpose))


def _describe(report: SourceReport, used: int, held_out: int = 0) -> str:
    counts = {
        "usable": report.usable,
        "used": used,
        "held out for evaluation": held_out,
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
