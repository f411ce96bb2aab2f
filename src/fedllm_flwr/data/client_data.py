"""One client's encoded examples: a partition in simulation, the site's own file in deployment."""

import itertools
import logging
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.config import Config
from fedllm_flwr.data.canaries import planted
from fedllm_flwr.data.federated import (
    FederatedData,
    load_federated_data,
    load_site_data,
    site_source,
)
from fedllm_flwr.data.kinds import Examples, RecordKind
from fedllm_flwr.data.partition import Partition, partition
from fedllm_flwr.data.poison import poisoned
from fedllm_flwr.data.remembered import cache_dir, path_digest, stamps
from fedllm_flwr.data.sources import Records
from fedllm_flwr.data.templates import Tokenizer
from fedllm_flwr.data.token_cache import encode_cached
from fedllm_flwr.errors import DataError
from fedllm_flwr.params import derive_seed

logger = logging.getLogger(__name__)

_SITE_CACHE_FILES = 4  # one per combination of length and template; each contains all records


@dataclass(frozen=True)
class ClientData:
    """A client's training examples, and its held-out examples for evaluation."""

    name: str
    train: Examples
    held_out: Examples
    secret: str = ""  # a site's secret, which seeds its draws together with the run's seed

    def draw_name(self, count: int) -> str:
        """The client's part of the seed for a draw of `count` records.

        With a secret, each count draws different records. Otherwise a server that asks for one more
        record would get two sets that it knows to differ in exactly one record.
        """
        return f"{self.name} {self.secret} {count}" if self.secret else self.name


@dataclass(frozen=True)
class SimulatedData:
    """The data of a simulated run: loaded, partitioned and encoded."""

    source: FederatedData
    partition: Partition
    encoded: Examples  # all training records
    left_out: tuple[str, ...] = ()  # clients without an example, with partition.on_empty=drop


@dataclass(frozen=True)
class _Keyed:
    """A configuration as a cache key; configurations with the same examples are equal."""

    text: str
    config: Config = field(compare=False)
    kind: RecordKind = field(compare=False)
    tokenizer: Tokenizer | None = field(compare=False, default=None)

    @classmethod
    def of(cls, config: Config, kind: RecordKind, tokenizer: Tokenizer | None = None) -> "_Keyed":
        """The key of a configuration's records or, with a tokenizer, of its encoded examples."""
        parts = [config.task, config.data, config.partition, config.federation.num_clients]
        parts += [config.seed, config.attack, config.privacy.canaries]
        for path in (config.data.path, config.data.eval_path, config.data.test_path):
            parts.append(None if path is None else stamps(Path(path).expanduser()))
        if tokenizer is not None:
            parts += [config.model, config.training.max_length]
        return cls(repr(parts), config, kind, tokenizer)


@lru_cache(maxsize=1)
def _divided(keyed: _Keyed) -> tuple[FederatedData, Partition]:
    config = keyed.config
    source = load_federated_data(config, keyed.kind)
    source = replace(source, train=planted(config, keyed.kind, source.train))
    count = config.federation.num_clients
    return source, partition(source.train["client"], config.partition, count, config.seed)


@lru_cache(maxsize=1)
def _simulated(keyed: _Keyed) -> SimulatedData:
    assert keyed.tokenizer is not None
    source, clients = divided_data(keyed.config, keyed.kind)
    records = poisoned(keyed.config, clients, source.train)
    encoded = encode_records(keyed.config, keyed.kind, keyed.tokenizer, records)
    data = SimulatedData(source, clients, encoded)
    if keyed.config.partition.on_empty == "error":
        return data
    kept = [bool(count) for count in _num_examples(data)]
    names = tuple(itertools.compress(clients.names, kept))
    left = Partition(list(names), list(itertools.compress(clients.indices, kept)))
    return replace(data, partition=left, left_out=tuple(sorted({*clients.names} - {*names})))


@lru_cache(maxsize=1)
def _site(keyed: _Keyed, folder: Path, digests: Path | None) -> Examples:
    assert keyed.tokenizer is not None
    config = keyed.config
    sample = [config.seed, config.data.max_samples] if config.data.max_samples else []
    identity = f"{site_source(config, keyed.kind).identity(digests)} {sample}"
    encoded: Examples = encode_cached(
        *(keyed.kind.codec, identity, lambda: load_site_data(config, keyed.kind), keyed.tokenizer),
        *_encoding(config),
        folder=folder,
        most_files=_SITE_CACHE_FILES,
    )
    for line in truncation_report(config, encoded):
        logger.warning("%s", line)
    return encoded


def divided_data(config: Config, kind: RecordKind) -> tuple[FederatedData, Partition]:
    """The records and clients of a simulated run; the process caches the last result."""
    return _divided(_Keyed.of(config, kind))


def simulated_data(config: Config, kind: RecordKind, tokenizer: Tokenizer) -> SimulatedData:
    """The records, clients and examples of a simulated run; cached as in `divided_data`."""
    return _simulated(_Keyed.of(config, kind, tokenizer))


def encode_records(
    config: Config, kind: RecordKind, tokenizer: Tokenizer, records: Records
) -> Examples:
    """Encode records with the configured template and length; cached on disk."""
    encoded: Examples = encode_cached(
        *(kind.codec, records.identity, lambda: records, tokenizer),
        *_encoding(config),
        folder=cache_dir() / "tokens" if records.identity else None,
    )
    return encoded


def _encoding(config: Config) -> tuple[str, int, str]:
    """Template, maximum length and truncation."""
    return config.data.template, config.training.max_length, config.data.truncation


def truncation_report(config: Config, encoded: Examples) -> list[str]:
    """The truncation report as a line, or no line if every record fits."""
    limits = f"(training.max_length={config.training.max_length}, data.truncation="
    found = encoded.report.summary
    return [f"{found} {limits}{config.data.truncation})"] if found else []


def require_examples(config: Config, whose: str, count: int, remedy: str = "") -> None:
    """Require that a client, or the held-out set, has an example left after encoding.

    Args:
        remedy: a further remedy for the message.

    Raises:
        DataError: names the responsible keys.
    """
    if not count:
        raise DataError(
            f"training.max_length={config.training.max_length} with data.truncation="
            f"{config.data.truncation} leaves no example of {whose}; raise the length, or cut "
            f"elsewhere (right: the answer's end, left: the prompt's start){remedy}",
            f"training.max_length={config.training.max_length} leaves none of its examples",
        )


def require_clients_examples(config: Config, data: SimulatedData) -> None:
    """Apply `require_examples` to all clients of a simulation together, then to each."""
    require_examples(config, "any client", len(data.encoded))
    for name, count in client_sizes(config, data).items():
        require_examples(config, name, count, "; or leave it out: partition.on_empty=drop")


def client_sizes(config: Config, data: SimulatedData) -> dict[str, int]:
    """Number of training examples of each client, in client order."""
    return {
        name: count - _num_held_out(config, count)
        for name, count in zip(data.partition.names, _num_examples(data), strict=True)
    }


def _num_examples(data: SimulatedData) -> list[int]:
    """Number of encoded examples of each client, in client order."""
    place = np.full(len(data.source.train), -1)
    for index, rows in enumerate(data.partition.indices):
        place[rows] = index
    owners = place[data.encoded.source]
    counts = np.bincount(owners[owners >= 0], minlength=data.partition.num_clients)
    return [int(count) for count in counts]


def simulated_client(
    config: Config, kind: RecordKind, tokenizer: Tokenizer, index: int
) -> ClientData:
    """The examples of simulated client `index`.

    Raises:
        DataError: there is no such client.
    """
    data = simulated_data(config, kind, tokenizer)
    names = data.partition.names
    if index >= len(names):
        raise DataError(
            f"the data make {len(names)} clients, but the simulation has more nodes; start it "
            f"with --federation-config 'num-supernodes={len(names)}'"
        )
    mine = np.flatnonzero(np.isin(data.encoded.source, data.partition.indices[index]))
    return _with_held_out(names[index], data.encoded, mine, config)


def site_client(
    config: Config,
    kind: RecordKind,
    tokenizer: Tokenizer,
    name: str,
    cache: Path | None = None,
    secret: str = "",
    digests: Path | None = None,
) -> ClientData:
    """The examples of a site, whose data file is ``config.data.path``.

    Args:
        cache: folder for the site's tokenised records; None: the user's cache.
        secret: the site's secret, which seeds its draws.
        digests: folder that keeps file digests between processes; None: they are not kept.
    """
    folder = cache_dir() / "tokens" if cache is None else cache
    encoded = _site(_Keyed.of(config, kind, tokenizer), folder, digests)
    require_examples(config, name, len(encoded))
    return _with_held_out(name, encoded, np.arange(len(encoded)), config, secret)


def data_identity(config: Config, digests: Path | None = None) -> str:
    """Digest of a site's data file, or of the files in its directory; "" if there is none.

    Args:
        digests: as for `site_client`.
    """
    return path_digest(Path(str(config.data.path)).expanduser(), digests)


def _num_held_out(config: Config, count: int) -> int:
    """Number of examples, out of `count`, that a client holds out to score adapters."""
    if not config.evaluation.clients or count < 2:
        return 0
    return max(1, round(count * config.data.validation_fraction))


def _with_held_out(
    name: str, encoded: Examples, mine: NDArray[np.int64], config: Config, secret: str = ""
) -> ClientData:
    """Hold out a seeded part, at least one example, if clients evaluate."""
    count = _num_held_out(config, len(mine))
    whole = ClientData(name, encoded, encoded, secret)
    generator = np.random.default_rng(derive_seed(config.seed, "held out", whole.draw_name(count)))
    chosen = np.sort(generator.permutation(len(mine))[:count])
    if len(mine) == len(encoded) and not count:  # avoids a copy
        return replace(whole, held_out=encoded.take(chosen))
    return replace(
        whole, train=encoded.take(np.delete(mine, chosen)), held_out=encoded.take(mine[chosen])
    )
