"""The server's copies of the client adapters of the local baseline, for scoring.

To compare the baseline with the federation, the server scores each adapter on the central held-out
set. The adapters are stored in files by client and round; only one of them is in memory at a time.
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
        directory: contains one folder per client.
        initial: the initial adapter of all clients.
    """

    def __init__(self, directory: Path, initial: Params) -> None:
        self._directory = directory
        self._initial = initial
        self._scored: dict[str, Scores] = {}  # by client; removed when the client trains again

    def store(
        self, server_round: int, name: str, delta: Params, acknowledged: int, oldest: int
    ) -> None:
        """Store a client's adapter after a round: the initial adapter plus `delta`.

        Args:
            acknowledged, oldest: as in `RoundStore.store`.
        """
        self._scored.pop(name, None)
        adapter = {"adapter": Kept(add(self._initial, delta))}
        self._store(name).store(server_round, adapter, acknowledged, oldest)

    def load(self, name: str, acknowledged: Acknowledged) -> Params:
        """A client's adapter after its newest accepted update; the initial one before the first.

        Raises:
            FederationError: the adapter's file is missing.
        """
        if not acknowledged.round:
            return self._initial
        kept = self._store(name).load(acknowledged.round)
        if kept is None:
            raise FederationError(
                f"the adapter that {name} reached in round {acknowledged.round} is not in "
                f"{self._directory} any more; put it back, or start a new run."
            )
        return kept["adapter"].tensors

    def scores(
        self, clients: Mapping[str, Acknowledged], evaluate: Callable[[Params], Scores]
    ) -> dict[str, Scores]:
        """Scores of the clients that have trained; only newly trained adapters are scored again."""
        trained = {name: client for name, client in clients.items() if client.round}
        for name, client in trained.items():
            if name not in self._scored:
                self._scored[name] = evaluate(self.load(name, client))
        return {name: self._scored[name] for name in trained}

    @staticmethod
    def name_of(folder: str) -> str:
        """The client whose folder has this name."""
        return unquote(folder)

    def _store(self, name: str) -> RoundStore:
        return RoundStore(self._directory / folder_name(name))
