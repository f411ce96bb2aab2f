"""Partitions one data set into clients, with the partitioners of flwr-datasets."""

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.config.schema import DEFAULT_NUM_CLIENTS, PartitionConfig
from fedllm_flwr.data.sources import Records
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.params import derive_seed

if TYPE_CHECKING:
    import datasets

DIRICHLET_SEEDS = 20  # each allows flwr-datasets' eleven draws to reach min_size


@dataclass(frozen=True)
class Partition:
    """Clients in a fixed order; every training record belongs to at most one of them."""

    names: list[str]
    indices: list[NDArray[np.int64]]  # indices of each client's training records

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.names)


@dataclass(frozen=True)
class ClientStats:
    """One row of the table of clients; lengths are characters over all turns of a record."""

    name: str
    num_examples: int
    label_counts: dict[str, int]
    mean_length: float
    median_length: float
    max_length: int


def partition(
    keys: list[str], config: PartitionConfig, num_clients: int | None, seed: int
) -> Partition:
    """Partition records into clients; the same seed gives the same clients.

    Args:
        keys: value of partition.column of each training record; "" if there is no column.
        num_clients: None: 10, or one client per value for a natural partition.

    Raises:
        ConfigError: the records cannot be partitioned like this.
    """
    if config.name in ("dirichlet", "natural", "pathological"):
        if config.column is None:
            raise ConfigError(
                f"partition={config.name} needs a column to divide by, but partition.column is not "
                "set and the data set names none; set partition.column=<column>, or use "
                "partition=iid"
            )
        if not all(keys):
            raise ConfigError(
                f"partition.column={config.column} has no value in {keys.count('')} records; "
                f"fill it in, or leave them out with data.on_bad_record=skip"
            )
    if config.name == "natural":
        names = sorted(set(keys))
        if num_clients not in (None, len(names)):
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ConfigError(
                f"federation.num_clients={num_clients}, but partition.column={config.column} has "
                f"{len(names)} values ({shown}), one client each; set federation.num_clients="
                f"{len(names)} or null, or divide evenly among {num_clients} clients: partition=iid"
            )
    else:
        count = DEFAULT_NUM_CLIENTS if num_clients is None else num_clients
        if count < 1:
            raise ConfigError(f"federation.num_clients must be at least 1, got {count}")
        if count > len(keys):
            raise ConfigError(
                f"federation.num_clients={count} is more than the {len(keys)} training records; "
                f"set federation.num_clients={len(keys)} or less, or raise data.max_samples"
            )
        names = [f"client-{i}" for i in range(count)]
    order = _shuffled(keys, config, seed)
    if config.name == "iid":  # as IidPartitioner, which takes 2 ms a client
        return Partition(names, np.array_split(order, len(names)))
    if config.name == "natural":  # as NaturalIdPartitioner, which reads all records for each client
        values = np.unique(np.array(keys, dtype=object), return_inverse=True)[1]
        by_value = np.argsort(values, kind="stable")
        ends = np.flatnonzero(np.diff(values[by_value])) + 1
        return Partition(names, np.split(by_value, ends))
    return Partition(names, _divided(keys, order, config, len(names), seed))


def describe(partition: Partition, train: Records) -> list[ClientStats]:
    """Sizes, labels and lengths of every client, in client order."""
    labels = np.array(train["label"], dtype=object)
    lengths = train.characters
    return [
        ClientStats(
            name=name,
            num_examples=len(rows),
            label_counts=dict(sorted(Counter(labels[rows]).items())),
            mean_length=float(lengths[rows].mean()),
            median_length=float(np.median(lengths[rows])),
            max_length=int(lengths[rows].max()),
        )
        for name, rows in zip(partition.names, partition.indices, strict=True)
    ]


def _shuffled(keys: list[str], config: PartitionConfig, seed: int) -> NDArray[np.int64]:
    """The order in which a partitioner sees the records.

    Every partitioner except the natural one cuts contiguous pieces, of all records or of each
    class, and files are often sorted by source or subject. Therefore all records are shuffled for
    iid and size. For partitioners that cut classes, records are shuffled within each class, which
    does not change the sequence of keys, and so no sizes or counts.
    """
    rows = np.arange(len(keys))
    if config.name != "natural":
        rows = np.random.default_rng(derive_seed(seed, "partition")).permutation(len(keys))
    if config.name in ("dirichlet", "pathological"):
        classes = np.unique(np.array(keys, dtype=object), return_inverse=True)[1]
        shuffled, rows = rows, np.empty_like(rows)
        by_class = np.argsort(classes, kind="stable")  # positions of each class, in file order
        rows[by_class] = shuffled[np.argsort(classes[shuffled], kind="stable")]
    return rows


def _divided(
    keys: list[str], rows: NDArray[np.int64], config: PartitionConfig, num_clients: int, seed: int
) -> list[NDArray[np.int64]]:
    """Record indices of each client, from one of flwr-datasets' partitioners."""
    import datasets
    from flwr_datasets import partitioner as partitioners

    order = datasets.Dataset.from_dict({"row": rows, "key": [keys[i] for i in rows]})

    def by(partitioner: Any) -> list[NDArray[np.int64]]:
        partitioner.dataset = order
        # Its warnings are checked here or turned into errors; its progress bar goes to stderr.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            parts = (partitioner.load_partition(i)["row"][:] for i in range(num_clients))
            return [np.array(rows, np.int64) for rows in parts]

    match config.name:
        case "size":  # client i gets a share proportional to (i + 1) ** alpha
            try:
                return by(
                    partitioners.IdToSizeFncPartitioner(num_clients, lambda n: n**config.alpha)
                )
            except ValueError:
                raise ConfigError(
                    f"partition.alpha={config.alpha} leaves some of {num_clients} clients without "
                    f"any of the {len(order)} records; lower it, or give fewer clients by "
                    "federation.num_clients"
                ) from None
        case "pathological":
            return _pathological(order, config, num_clients, seed, by)
        case _:
            return _dirichlet(order, config, num_clients, seed, by)


_By = Callable[[Any], list[NDArray[np.int64]]]


def _dirichlet(
    order: "datasets.Dataset", config: PartitionConfig, num_clients: int, seed: int, by: _By
) -> list[NDArray[np.int64]]:
    """Shares of each class ~ Dirichlet(alpha), redrawn until all clients reach min_size."""
    from flwr_datasets.partitioner import DirichletPartitioner

    if (wanted := config.min_size * num_clients) > len(order):
        raise ConfigError(
            f"partition.min_size={config.min_size} for each of federation.num_clients="
            f"{num_clients} takes {wanted} records, but there are {len(order)}; lower one of them"
        )
    for attempt in range(DIRICHLET_SEEDS):
        partitioner = DirichletPartitioner(
            num_partitions=num_clients,
            partition_by="key",
            alpha=float(config.alpha),
            min_partition_size=config.min_size,
            self_balancing=False,
            seed=derive_seed(seed, "partition", attempt),
        )
        try:
            return by(partitioner)
        except ValueError:
            continue
    raise ConfigError(
        f"partition.alpha={config.alpha} with federation.num_clients={num_clients} and "
        f"{len(order)} records never gave every client partition.min_size={config.min_size} "
        f"records; raise alpha, or lower min_size or num_clients"
    )


def _pathological(
    order: "datasets.Dataset", config: PartitionConfig, num_clients: int, seed: int, by: _By
) -> list[NDArray[np.int64]]:
    """Every client gets classes_per_client classes; client i has class i mod num_classes."""
    from flwr_datasets.partitioner import PathologicalPartitioner

    classes = sorted(set(order["key"][:]))
    if config.classes_per_client > len(classes):
        raise ConfigError(
            f"partition.classes_per_client={config.classes_per_client}, but "
            f"partition.column={config.column} has only {len(classes)} values "
            f"({', '.join(classes[:10])}); lower it"
        )
    partitioner = PathologicalPartitioner(
        num_partitions=num_clients,
        partition_by="key",
        num_classes_per_partition=config.classes_per_client,
        class_assignment_mode="first-deterministic",
        seed=derive_seed(seed, "partition"),
    )
    try:
        return by(partitioner)
    except ValueError:
        rarest, count = Counter(order["key"][:]).most_common()[-1]
        raise ConfigError(
            f"partition=pathological: a value of partition.column={config.column} has fewer "
            f"records than clients that need it (the rarest, {rarest!r}, has {count}); give "
            f"fewer clients than federation.num_clients={num_clients}, or use partition=dirichlet"
        ) from None
