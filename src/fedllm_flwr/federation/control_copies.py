"""The server's copies of the clients' control variates, so that c stays their mean.

SCAFFOLD's c moves by what clients send: c_i+ - c_i. A client that has lost c_i starts from zero,
and its old share has to come out of c again; nobody but the server can still know it.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Acknowledged, Update
from fedllm_flwr.federation.round_store import RoundStore, folder_name
from fedllm_flwr.params import Params, add, check_like


class ControlCopies:
    """c_i of every client by acknowledged round, on disk; memory holds two tensors of an adapter.

    Args:
        directory: one folder for each client below it.
        like: names and shapes of the adapter's tensors.
    """

    def __init__(self, directory: Path, like: Params) -> None:
        self._directory = directory
        self._like = like

    def require(self, clients: Mapping[str, Acknowledged]) -> None:
        """Refuse to go on without the copy of a client that has a share in c.

        Raises:
            FederationError: names the client and its file's folder.
        """
        for name, client in clients.items():
            store = RoundStore(self._directory / folder_name(name))
            if client.round and client.round not in store.rounds():
                raise FederationError(
                    f"the control variate of {name} of round {client.round} is not in "
                    f"{self._directory / folder_name(name)} any more; put it back, or start the "
                    "run anew."
                )

    def accept(
        self,
        name: str,
        update: Update,
        server_round: int,
        acknowledged: int,
        oldest_checkpoint: int,
    ) -> Params:
        """Store c_i+ and return c_i+ - c_i in float64, c_i being the client's share in c.

        Raises:
            FederationError: c_i+ holds absurd values, or the file system refuses.
        """
        assert update.control_delta is not None
        store = RoundStore(self._directory / folder_name(name))
        zero = {key: np.zeros_like(value) for key, value in update.control_delta.items()}
        old = zero
        if acknowledged:
            groups = store.load(acknowledged)
            if groups is None:
                raise FederationError(
                    f"the server cannot read its copy of {name}'s control variate of round "
                    f"{acknowledged}"
                )
            old = groups["control"]
        new = add(zero if update.lost else old, update.control_delta)
        check_like(new, self._like)
        store.store(server_round, {"control": new}, acknowledged, oldest_checkpoint)
        return {key: value.astype(np.float64) - old[key] for key, value in new.items()}
