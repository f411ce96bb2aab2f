"""Adapters of the local baseline's clients, kept by the server for scoring.

The baseline compares them with the federation, so the server scores each on the central test set.
They are kept in files by client and round: memory holds one of them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import unquote

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Acknowledged
from fedllm_flwr.federation.round_store import RoundStore, folder_name
from fedllm_flwr.params import Kept, Params, add
from fedllm_flwr.tasks.base import Scores


class LocalAdapters:
    """The adapter of every client that has trained, on disk.

    Args:
        directory: one folder for each client below it.
        initial: where all of them started.
    """

    def __init__(self, directory: Path, initial: Params) -> None:
        self._directory = directory
        self._initial = initial
        self._scored: dict[str, Scores] = {}  # by client; dropped when it trains again

    def store(
        self, server_round: int, name: str, delta: Params, acknowledged: int, oldest: int
    ) -> None:
        """Keep the adapter that a client has reached in a round: its start plus `delta`.

        Args:
            acknowledged, oldest: as `RoundStore.store` takes them.
        """
        self._scored.pop(name, None)
        adapter = {"adapter": Kept(add(self._initial, delta))}
        self._store(name).store(server_round, adapter, acknowledged, oldest)

    def load(self, name: str, acknowledged: Acknowledged) -> Params:
        """A client's adapter after its newest accepted update; its start before the first.

        Raises:
            FederationError: it is not on disk any more.
        """
        if not acknowledged.round:
            return self._initial
        kept = self._store(name).load(acknowledged.round)
        if kept is None:
            raise FederationError(
                f"the adapter that {name} reached in round {acknowledged.round} is not in "
                f"{self._directory} any more; put it back, or start the run anew."
            )
        return kept["adapter"].tensors

    def scores(
        self, clients: Mapping[str, Acknowledged], evaluate: Callable[[Params], Scores]
    ) -> dict[str, Scores]:
        """Scores of the clients that have trained; one that did not train since keeps its own."""
        trained = {name: client for name, client in clients.items() if client.round}
        for name, client in trained.items():
            if name not in self._scored:
                self._scored[name] = evaluate(self.load(name, client))
        return {name: self._scored[name] for name in trained}

    @staticmethod
    def name_of(folder: str) -> str:
        """The client whose name as that of a folder this is."""
        return unquote(folder)

    def _store(self, name: str) -> RoundStore:
        return RoundStore(self._directory / folder_name(name))
