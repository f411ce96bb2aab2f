"""The server's copies of client memory, for algorithms whose server state sums over all clients.

Clients send the change c_i+ - c_i, which SCAFFOLD's server adds to c. If a client has lost its c_i,
it starts from zero, and the server must subtract the client's old share from c. Only the server's
copy still holds that share.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Acknowledged, Update
from fedllm_flwr.federation.round_store import RoundStore, folder_name
from fedllm_flwr.params import Groups, Kept, Params, add, check_like

_NAMES = {"control": "control variate"}  # kinds of client memory, as shown to users


class ServerCopies:
    """Copies of client memory on disk, by client and acknowledged round.

    At most one client's tensors are in RAM at a time.

    Args:
        directory: contains one folder per client.
        contributes: group of tensors -> the kind of client memory whose change it is
            (`Rule.contributes`).
    """

    def __init__(self, directory: Path, contributes: Mapping[str, str]) -> None:
        self._directory = directory
        self._contributes = contributes

    def require(self, clients: Mapping[str, Acknowledged]) -> None:
        """Require a copy for every client that has a share in the server's state.

        Raises:
            FederationError: names the client and the folder of the missing file.
        """
        for name, client in clients.items() if self._contributes else ():
            folder = self._directory / folder_name(name)
            if client.round and client.round not in RoundStore(folder).rounds():
                kinds = " and ".join(_NAMES.get(kind, kind) for kind in self._contributes.values())
                raise FederationError(
                    f"the {kinds} of {name} of round {client.round} is not in {folder} any more; "
                    "put it back, or start a new run."
                )

    def accept(
        self,
        name: str,
        update: Update,
        like: Params,
        server_round: int,
        acknowledged: int,
        oldest_checkpoint: int,
    ) -> Groups:
        """Store the client's new memory and return how its share changes, in float64.

        Args:
            like: names and shapes of the adapter's tensors.

        Raises:
            FederationError: a contribution is missing or leads to values out of range, or the file
                cannot be written.
        """
        store = RoundStore(self._directory / folder_name(name))
        before = store.load(acknowledged) if acknowledged and self._contributes else {}
        changes: dict[str, Params] = {}
        kept: dict[str, Kept] = {}
        for group, kind in self._contributes.items():
            what = _NAMES.get(kind, kind)
            if (change := update.contributed.get(group)) is None:
                raise FederationError(f"its {what} is missing")
            if before is None:
                raise FederationError(
                    f"the server cannot read its copy of {name}'s {what} of round {acknowledged}"
                )
            zero = {key: np.zeros_like(value) for key, value in change.items()}
            old = before[kind].tensors if kind in before else zero
            try:
                check_like(change, like)
                new = add(zero if update.lost else old, change)
                check_like(new, like)
            except FederationError as error:
                raise type(error)(f"{what}: {error}") from error
            kept[kind] = Kept(new)
            changes[group] = {
                key: value.astype(np.float64) - old[key] for key, value in new.items()
            }
        if kept:
            store.store(server_round, kept, acknowledged, oldest_checkpoint)
        return changes
