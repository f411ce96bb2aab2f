"""Round store: tensors by kind on disk, one file for each round that left some.

What a client remembers of a run and what the server knows of each client are such stores. A round
starts from exactly the version that the server has acknowledged, so that a lost reply, a repeated
round or a server that returns to an older checkpoint changes nothing.
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
    """A client's name as that of a folder."""
    return quote(client, safe=" ").replace(".", "%2E")


class RoundStore:
    """Versions of what is kept in `directory`, by round.

    A version is written before the server acknowledges its round, if it ever does. So versions
    pile up until it is known which of them can still be asked for.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def rounds(self) -> list[int]:
        """Rounds of which there is a version, in rising order."""
        found = (path.stem.partition("-")[2] for path in self._directory.glob("round-*.*"))
        return sorted(int(number) for number in found if number.isdigit())

    def load(self, server_round: int) -> dict[str, Kept] | None:
        """What a round left, by kind; None, which is logged, if it is not there or unreadable."""
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
        """Write the version of a round, then remove those that no server can ask for any more.

        Args:
            acknowledged: round that this one started from, 0 for none. The versions between are
                of rounds that the server did not accept.
            oldest_checkpoint: round of the oldest state that the server may go back to. It asks
                for the newest version that it had accepted by then.

        Raises:
            FederationError: the file system refuses.
        """
        for unfinished in self._directory.glob(".round-*"):  # of a process that was killed
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
        """Where the version of a round lies, if it is kept."""
        return self._directory / f"round-{server_round:05d}.safetensors"
