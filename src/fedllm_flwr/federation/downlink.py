"""The compressed downlink: quantized steps between what clients receive in successive rounds.

Clients start round r from the reference R_r instead of the server's tensors w_r (the adapter, and
the rule's further groups such as SCAFFOLD's c)::

    R_1 = cast(w_1),  R_r = cast(R_r-1 + Q(w_r - R_r-1))

Q quantizes as an update transform of that name does, but to the nearest level, and cast rounds to
``communication.dtype``. What Q leaves out of one step is part of the next difference, so the
server needs no further error feedback (cf. Tang et al. 2019, "DoubleSqueeze",
https://arxiv.org/abs/1905.05957).

All clients of a round have the same reference, so the server keeps one, with its last steps. A
client keeps R_k of the round k in its client memory, and after the server has accepted its update
of that round, it is sent the steps k+1 to r. If these take as many bytes as R_r, or if the client
has lost R_k, it is sent R_r.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedllm_flwr.config import Config
from fedllm_flwr.errors import FederationError, LostDownloadError
from fedllm_flwr.federation.client_memory import RECEIVED
from fedllm_flwr.federation.messages import Acknowledged, Assignment, Download
from fedllm_flwr.federation.round_store import RoundStore
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.federation.updates.cast import round_trip, wire_bytes
from fedllm_flwr.federation.updates.compress import Compression
from fedllm_flwr.params import Groups, Params, digest
from fedllm_flwr.plugins import TRANSFORMS

DOWNLINK = "downlink"
"""Group in ``ServerState.tensors``: R_r, which the clients of the next round start from."""
_STEP = f"{DOWNLINK}."  # prefix of the groups of its last steps, with the round that each leads to


@dataclass(frozen=True)
class Downlink:
    """Both ends of a compressed downlink."""

    compression: Compression
    dtype: str

    @classmethod
    def of(cls, config: Config) -> "Downlink | None":
        """The downlink of a configuration; None: clients get all tensors in every round."""
        chosen = config.communication
        if chosen.downlink == "whole":
            return None
        kind: Any = TRANSFORMS.find(chosen.downlink)
        return cls(kind(config), chosen.dtype)

    # The server's end

    def advanced(self, before: Groups, sent: Groups, server_round: int) -> dict[str, Params]:
        """The reference of a round and the last steps to it, as groups of ``ServerState.tensors``.

        A step leaves out the tensors that it would not change. As many steps are kept as are
        together smaller than the reference.

        Args:
            before: ``tensors`` of the state before, empty at the start of a run.
            sent: w_r, the groups of tensors for all clients of the round.
        """
        target, reference = _flat(sent), before.get(DOWNLINK)
        if reference is None:
            return {DOWNLINK: round_trip(_float32(target), self.dtype)}
        change = _float32({n: value - reference[n] for n, value in target.items()})
        step = {n: self.compression.compressed(v.ravel(), None) for n, v in change.items()}
        moved = self.moved(reference, step)
        step = {n: v for n, v in step.items() if not np.array_equal(moved[n], reference[n])}
        found = {DOWNLINK: {**reference, **{name: moved[name] for name in step}}}
        room = wire_bytes(reference, self.dtype)
        newest_first = [step, *(before.get(f"{_STEP}{n}") for n in range(server_round - 1, 1, -1))]
        for age, older in enumerate(newest_first):
            if older is None or (room := room - wire_bytes(older, self.dtype)) <= 0:
                break
            found[f"{_STEP}{server_round - age}"] = older
        return found

    def downloads(self, state: ServerState, clients: Iterable[str]) -> dict[str, Download]:
        """What each of the `clients` is sent in the round after `state`, by name."""
        tensors, server_round = state.tensors, state.round + 1
        whole = self.whole(state)
        found = {}
        for name in clients:
            acknowledged = state.clients.get(name, Acknowledged()).round
            after = range(acknowledged + 1, server_round + 1)
            steps = [tensors[key] for n in after if (key := f"{_STEP}{n}") in tensors]
            known = acknowledged and len(steps) == len(after)
            changes = tuple(step for step in steps if step)
            found[name] = replace(whole, whole=None, steps=changes) if known else whole
        return found

    @staticmethod
    def whole(state: ServerState) -> Download:
        """The download of a client that has no reference."""
        reference = state.tensors[DOWNLINK]
        return Download(digest(reference), reference)

    # Both ends

    def moved(self, reference: Params, step: Params) -> Params:
        """The reference after a step, in float32.

        Raises:
            FederationError: the step does not belong to this reference.
        """
        change = self.compression.decoded(step, reference)
        after = {name: reference[name] + value for name, value in change.items()}
        return {**reference, **round_trip(after, self.dtype)}


def received(assignment: Assignment, directory: Path) -> Assignment:
    """The client's end: the assignment with its tensors.

    Args:
        directory: the client's memory of the run.

    Raises:
        LostDownloadError: the client has not kept what the steps start from, or has other bits.
        FederationError: the server cannot have sent this.
    """
    download, downlink = assignment.download, Downlink.of(assignment.config)
    if download is None:
        return assignment
    if downlink is None:
        text = "a compressed download, but communication.downlink=whole"
        raise FederationError(text, text)
    reference = download.whole or _kept(directory, assignment.acknowledged.round)
    size = sum(wire_bytes(step, downlink.dtype) for step in download.steps)
    if reference and size >= wire_bytes(reference, downlink.dtype):
        text = f"the steps of the download take {size} bytes, more than the adapter"
        raise FederationError(text, text)
    for step in download.steps if reference else ():
        reference = downlink.moved(reference, step)
    if digest(reference) != download.digest:
        text = (
            "it has no tensors of round "
            f"{assignment.acknowledged.round} that the steps lead from to the server's"
        )
        raise LostDownloadError(text, text)
    groups: dict[str, Params] = {}
    for name, value in reference.items():
        group, _, inner = name.partition("/")
        groups.setdefault(group, {})[inner] = value
    params = groups.pop("params", {})
    done = replace(download, whole=reference, steps=())
    return replace(assignment, params=params, sent=groups, download=done)


def _kept(directory: Path, acknowledged: int) -> Params:
    """What the client received in a round; empty if it has not kept it."""
    kept = RoundStore(directory).load(acknowledged) if acknowledged else None
    return kept[RECEIVED].tensors if kept and RECEIVED in kept else {}


def _flat(groups: Groups) -> Params:
    return {f"{group}/{name}": v for group, params in groups.items() for name, v in params.items()}


def _float32(params: Params) -> Params:
    return {name: np.asarray(value, np.float32) for name, value in params.items()}
