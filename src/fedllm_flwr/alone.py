"""The adapters of clients that train alone, as the server gets to know them.

The baseline compares them with the federation, so the server scores each on the central test set.
They are kept in files by client and round: memory holds one of them.
"""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, unquote

from fedllm_flwr.params import Params, add
from fedllm_flwr.versions import newest_version, store_version

Scores = dict[str, float]


class AloneAdapters:
    """Newest adapter of every client that has trained, on disk.

    Args:
        directory: one folder for each client below it.
        initial: where all of them started.
        keep: newest adapters of each client that are kept.
    """

    def __init__(self, directory: Path, initial: Params, keep: int = 2) -> None:
        self._directory, self._keep = directory, keep
        self._initial = initial
        self._scored: dict[str, Scores] = {}  # by client; dropped when it trains again

    def store(self, server_round: int, name: str, delta: Params) -> None:
        """Keep the adapter that a client has reached in a round: its start plus `delta`."""
        self._scored.pop(name, None)
        adapter = add(self._initial, delta)
        store_version(self._folder(name), "adapter", server_round, adapter, self._keep)

    def names(self) -> list[str]:
        """Clients that have trained at least once."""
        if not self._directory.is_dir():
            return []
        return sorted(unquote(folder.name) for folder in self._directory.iterdir())

    def load(self, name: str, server_round: int) -> Params:
        """A client's adapter after a round; its start if nothing is there."""
        newest = newest_version(self._folder(name), "adapter", server_round + 1, like=self._initial)
        return newest or self._initial

    def scores(self, server_round: int, evaluate: Callable[[Params], Scores]) -> dict[str, Scores]:
        """Scores by client after a round; a client that did not train since is not scored anew."""
        for name in self.names():
            if name not in self._scored:
                self._scored[name] = evaluate(self.load(name, server_round))
        return {name: self._scored[name] for name in self.names()}

    @staticmethod
    def folder_name(name: str) -> str:
        """A client's name as that of a folder."""
        return quote(name, safe=" ").replace(".", "%2E")

    @staticmethod
    def name_of(folder: str) -> str:
        """The client whose name as that of a folder this is."""
        return unquote(folder)

    def _folder(self, name: str) -> Path:
        return self._directory / self.folder_name(name)
