"""Different adapter ranks of clients, from the entries ``name:rank`` of ``lora.ranks``."""

from fnmatch import fnmatchcase

from fedllm_flwr.config.schema import Config, LoraConfig, changed
from fedllm_flwr.errors import ConfigError


def parsed(entry: str) -> tuple[str, int]:
    """The name, or name pattern, and the rank of an entry.

    Raises:
        ConfigError: the entry does not have this form.
    """
    pattern, _, rank = entry.rpartition(":")
    if not pattern or not rank.isdecimal() or not int(rank):
        raise ConfigError(
            f"lora.ranks: {entry} is not of the form name:rank; write lora.ranks=[desk-1:4,*-2:8]."
        )
    return pattern, int(rank)


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
