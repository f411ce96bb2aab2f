"""Different adapter ranks of clients, from the entries ``name:rank`` of ``lora.ranks``."""

from collections.abc import Collection
from fnmatch import fnmatchcase

from fedllm_flwr.config.names import shown
from fedllm_flwr.config.schema import Config, LoraConfig, changed
from fedllm_flwr.errors import ConfigError

_MOST_NAMES = 12  # in an error message


def parsed(entry: str) -> tuple[str, int]:
    """The name, or name pattern, and the rank of an entry.

    Raises:
        ConfigError: the entry does not have this form.
    """
    pattern, _, rank = entry.rpartition(":")
    if not pattern or not rank.isdecimal():
        raise ConfigError(
            f"lora.ranks: {entry} is not of the form name:rank; write lora.ranks=[retail:4,t*:2]."
        )
    if not int(rank):
        raise ConfigError(f"lora.ranks: {entry}: a rank is at least 1.")
    return pattern, int(rank)


def check_names(config: Config, names: Collection[str]) -> None:
    """Require a client for each entry of ``lora.ranks``.

    Raises:
        ConfigError: names the first entry that matches none of `names`.
    """
    for pattern, rank in map(parsed, config.lora.ranks):
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(sorted(names)[:_MOST_NAMES]) + ", ..." * (len(names) > _MOST_NAMES)
            raise ConfigError(
                f"lora.ranks: {shown(pattern)}:{rank} matches no client; the clients are {some}."
            )


def rank_of_client(config: Config, name: str) -> int:
    """The rank of a client's adapter: of the first entry that matches its name, or ``lora.r``."""
    entries = map(parsed, config.lora.ranks)
    found = (rank for pattern, rank in entries if fnmatchcase(name, pattern))
    return next(found, config.lora.r)


def with_rank(config: Config, rank: int) -> Config:
    """`config` with another rank, and with the alpha that keeps the scale alpha / r."""
    lora = config.lora
    if rank == lora.r:
        return config
    return changed(config, lora={"r": rank, "alpha": lora.alpha * rank // lora.r})


def divides(lora: LoraConfig, rank: int) -> bool:
    """Whether alpha is an integer at this rank, with the same scale."""
    return lora.alpha * rank % lora.r == 0
