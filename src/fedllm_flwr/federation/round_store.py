"""Round store: versioned tensors on disk, by kind, with one file per round.

Client memory and the server's copies of it are round stores. A round starts from exactly the
version that the server has acknowledged, so a lost reply, a repeated round or a resume from an
older checkpoint does no harm.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.tensor_files import load_params, save_params
from fedllm_flwr.params import Kept

logger = logging.getLogger(__name__)

_ABOUT = "about."  # prefix in the metadata of a file


def folder_name(client: str) -> str:
    """A folder name for a client's name."""
    return quote(client, safe=" ").replace(".", "%2E")


class RoundStore:
    """Versions of a set of tensors in `directory`, by round.

    A version is written before the server acknowledges its round, which may never happen. Versions
    are therefore kept until it is known that the server cannot ask for them any more.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def rounds(self) -> list[int]:
        """Rounds that have a version, in ascending order."""
        found = (path.stem.partition("-")[2] for path in self._directory.glob("round-*.*"))
        return sorted(int(number) for number in found if number.isdigit())

    def load(self, server_round: int) -> dict[str, Kept] | None:
        """The version of a round, by kind; None (logged) if it is missing or unreadable."""
        try:
            groups, metadata = load_params(self.file(server_round))
        except FederationError as error:
            logger.warning("%s", error)
            return None
        return {
            kind: Kept(tensors, metadata.get(f"{_ABOUT}{kind}", ""))
            for kind, tensors in groups.items()
        }

    def store(
        self,
        server_round: int,
        kept: Mapping[str, Kept],
        acknowledged: int,
        oldest_checkpoint: int,
    ) -> None:
        """Write the version of a round, then remove those that the server cannot ask for any more.

        Args:
            acknowledged: round that this one started from, 0 for none. Versions between the two
                belong to rounds that the server did not accept.
            oldest_checkpoint: round of the oldest checkpoint that the server may resume from. It
                would then ask for the newest version that it had accepted by that round.

        Raises:
            FederationError: the file cannot be written.
        """
        for unfinished in self._directory.glob(".round-*"):  # left by a killed process
            unfinished.unlink(missing_ok=True)
        metadata = {f"{_ABOUT}{kind}": each.about for kind, each in kept.items() if each.about}
        groups = {kind: each.tensors for kind, each in kept.items()}
        save_params(self.file(server_round), groups, {"round": str(server_round), **metadata})
        accepted = [version for version in self.rounds() if version <= acknowledged]
        needed_from = max((v for v in accepted if v <= oldest_checkpoint), default=0)
        for version in self.rounds():
            if version < needed_from or acknowledged < version < server_round:
                self.file(version).unlink(missing_ok=True)

    def file(self, server_round: int) -> Path:
        """Path of the version of a round, which may not exist."""
        return self._directory / f"round-{server_round:05d}.safetensors"
