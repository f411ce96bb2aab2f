"""Tensors that are kept by round: one file for each, the last few of them.

A task of round r starts from the newest version older than r, so that a round that is repeated
after a crash starts from the same tensors and ends in the same bits.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from fedllm_flwr.checkpoint import load_params, save_params
from fedllm_flwr.config import Config
from fedllm_flwr.errors import FederationError
from fedllm_flwr.params import Params, check_like

logger = logging.getLogger(__name__)


def versions_to_keep(config: Config) -> int:
    """So many that one is there for each of the server's last two checkpoints."""
    return 2 * config.checkpoint.every


def store_version(
    directory: Path, kind: str, server_round: int, params: Params, keep: int = 2
) -> None:
    """Write the tensors of a round; it and those before are kept, `keep` in all.

    Versions of later rounds are removed: the server has taken those rounds back.

    Raises:
        FederationError: the file system refuses.
    """
    newest = _file(directory, kind, server_round)
    save_params(newest, {kind: params}, {"round": str(server_round)})
    versions = _versions(directory, kind)
    place = versions.index(newest)
    for path in versions[: max(0, place + 1 - keep)] + versions[place + 1 :]:
        path.unlink(missing_ok=True)


def newest_version(directory: Path, kind: str, before_round: int, like: Params) -> Params | None:
    """The newest version of an earlier round with the names and shapes of `like`, or None."""
    return newest_usable(directory, kind, before_round, lambda params: check_like(params, like))


def newest_usable(
    directory: Path, kind: str, before_round: int, check: Callable[[Params], None]
) -> Params | None:
    """The newest version of an earlier round that passes `check`, or None.

    What cannot be read, or is refused with a FederationError, is logged and passed over.
    """
    limit = _file(directory, kind, before_round)
    for path in reversed(_versions(directory, kind)):
        if path.name >= limit.name:
            continue
        try:
            params = load_params(path)[0].get(kind, {})
            check(params)
        except FederationError as error:
            logger.warning("%s is not used: %s", path, error)
            continue
        return params
    return None


def newest_file(directory: Path, kind: str, server_round: int) -> Path | None:
    """The file of the newest version up to a round, or None."""
    limit = _file(directory, kind, server_round).name
    return max((p for p in _versions(directory, kind) if p.name <= limit), default=None)


def _file(directory: Path, kind: str, server_round: int) -> Path:
    return directory / f"{kind}-{server_round:05d}.safetensors"


def _versions(directory: Path, kind: str) -> list[Path]:
    return sorted(directory.glob(f"{kind}-*.safetensors"))
