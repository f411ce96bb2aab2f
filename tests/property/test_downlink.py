"""Clients start from the chain of a naive transcription, whatever is lost on the way."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Assignment
from fedllm_flwr.federation.state import ServerState
from quadratics import NUM_CLIENTS, START, Federation, config_of, one_round

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEVELS = {"int8": 127, "int4": 7}


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to the dtype of the wire, by another implementation."""
    return torch.tensor(values.astype(np.float32)).to(TORCH[dtype]).float().numpy()  # type: ignore[no-any-return]


def quantized(values: np.ndarray, levels: int) -> np.ndarray:
    """Every value as the nearest of `levels` multiples of its block's scale: a loop."""
    found = np.zeros(values.size, np.float32)
    flat = values.astype(np.float32).ravel()
    for start in range(0, flat.size, 128):
        block = flat[start : start + 128]
        scale = np.abs(block).max() / np.float32(levels)
        for place, value in enumerate(block, start):
            if scale > 0:
                found[place] = np.float32(np.floor(value / scale + np.float32(0.5))) * scale
    return found.reshape(values.shape)


def successor(before: np.ndarray, now: np.ndarray, downlink: str, dtype: str) -> np.ndarray:
    """R_r from R_r-1 and w_r."""
    return cast(before + quantized(now - before, LEVELS[downlink]), dtype)


class Witness:
    """Keeps the server's tensors after every round, and the naive chain over them."""

    def __init__(self, federation: Federation, downlink: str, dtype: str) -> None:
        self.federation, self.downlink, self.dtype = federation, downlink, dtype
        self.chain: dict[int, dict[str, np.ndarray]] = {}  # by round that starts from it

    def tensors(self, state: ServerState) -> dict[str, np.ndarray]:
        control = state.tensors.get("control")
        return {"params": state.params["w"], **({"control": control["w"]} if control else {})}

    def note(self) -> None:
        state = self.federation.strategy.state
        now, before = self.tensors(state), self.chain.get(state.round)
        self.chain[state.round + 1] = {
            group: cast(value, self.dtype)
            if before is None
            else successor(before[group], value, self.downlink, self.dtype)
            for group, value in now.items()
        }

    def check(self, task: Assignment) -> None:
        """The bits that a client has trained from are those of the chain."""
        expected = self.chain[task.round]
        found = {group: params["w"] for group, params in task.tensors.items()}
        assert found.keys() == expected.keys()
        for group, value in found.items():
            assert value.tobytes() == expected[group].tobytes()


def checked(
    rounds: list[tuple[str, list[str], set[int]]], every: int, sampled: int, downlink: str
) -> int:
    """Play the rounds, and count the tasks that clients have trained; each is as in the chain."""
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(downlink=downlink, sample_clients=sampled, dtype="bfloat16")
        federation = Federation(Path(folder), config, NUM_CLIENTS, every)
        witness = Witness(federation, downlink, "bfloat16")
        witness.note()
        for server, fates, wiped in rounds:
            if server != "go on":
                federation.restart(back=server == "go back")
            for index in wiped:
                federation.wipe(f"client-{index}")
            late = {}  # tasks of earlier rounds, perhaps of another history, which come first
            for name, client in federation.clients.items():
                client.started.clear()
                late[name] = len(client.late)
            try:
                federation.round(**{f"client_{i}": fate for i, fate in enumerate(fates)})
            except FederationError as error:
                if "replies could be used" not in str(error):
                    raise
                federation.restart()
                continue
            finally:
                latest = federation.strategy.state.round
                for name, client in federation.clients.items():
                    for task in client.started[late[name] :]:
                        if task.round == latest:
                            witness.check(task)
                            count += 1
            witness.note()
            assert federation.offset() < 1e-14
    return count


def play(
    rounds: list[tuple[str, list[str], set[int]]], every: int, sampled: int, downlink: str
) -> None:
    """`checked`, as a property."""
    checked(rounds, every, sampled, downlink)


anything: dict[str, Any] = {
    "rounds": st.lists(one_round, min_size=1, max_size=8),
    "every": st.integers(1, 3),
    "sampled": st.integers(2, NUM_CLIENTS),
    "downlink": st.sampled_from(["int8", "int4"]),
}
test_clients_start_from_the_chain_whatever_is_lost: Callable[..., None] = settings(
    max_examples=10, deadline=None
)(given(**anything)(play))
test_clients_start_from_the_chain_in_many_more_histories = pytest.mark.slow(
    settings(max_examples=200, deadline=None)(given(**anything)(play))
)


def test_a_late_task_of_another_history_is_none_of_this_one() -> None:
    well = ["ok", "ok", "ok"]
    lost, late = ["ok", "ok", "lost"], ["late", "lost", "ok"]
    order = [("go on", well), ("go on", lost), ("go on", late), ("go back", well), ("go on", well)]
    rounds = [(server, fates, set()) for server, fates in order]
    assert checked(rounds, 1, 2, "int8") == 8  # two a round; the third has failed


@pytest.mark.parametrize("downlink", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_optimum_is_reached_although_every_download_is_coarse(
    downlink: str, tmp_path: Path
) -> None:
    """What a step leaves out is in the next one, for w and for SCAFFOLD's c."""
    federation = Federation(tmp_path, config_of(downlink=downlink), num_clients=4)
    for server_round in range(1, 41):
        if server_round == 10:
            federation.wipe("client-2")
        if server_round == 12:
            federation.restart(back=True)
        federation.round(client_1={3: "lost", 5: "late", 9: "idle"}.get(server_round, "ok"))
    assert federation.offset() < 1e-14
    assert federation.error() < 5e-7
    reached = federation.strategy.state.tensors["downlink"]["params/w"]
    assert np.linalg.norm(reached - START["w"]) > 0.1
