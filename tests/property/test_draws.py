"""Which records a client trains on when it takes part in some rounds only, and replies get lost."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.federation.messages import ClientInfo
from fedllm_flwr.federation.roster import Client, choose_clients
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.federation.strategies import STRATEGIES
from fedllm_flwr.federation.wire import pack_update, unpack_assignment
from fedllm_flwr.training.schedule import draw_examples
from memory_grid import MemoryGrid, superlink_error
from strategy_runs import START, config_of, update_of

NUM_CLIENTS, PER_ROUND = 5, 16


def accepted_draws(rounds: int, lost: set[int], size: int, seed: int) -> dict[str, list[int]]:
    """Records in the accepted updates of each client, two of five sampled a round, in order.

    The replies of the rounds in `lost` that one of the two sends do not arrive.
    """
    config = replace(config_of(sample_clients=2), seed=seed)
    names = [f"client-{i}" for i in range(NUM_CLIENTS)]
    drawn: dict[str, list[int]] = {name: [] for name in names}

    def node(name: str):
        def handler(message: Message) -> Message:
            task = unpack_assignment(message.content)
            updates = task.acknowledged.updates
            window = draw_examples(size, PER_ROUND, updates, seed, name).tolist()
            chosen = choose_clients(roster, config, task.round)
            if task.round in lost and name == chosen[0]:
                return superlink_error(message.metadata.message_id, 5, "gone")
            drawn[name] += window
            return Message(pack_update(update_of(message, name), "float32"), reply_to=message)

        return handler

    roster = {name: Client(100 + i, ClientInfo(name, size, "0")) for i, name in enumerate(names)}
    strategy = STRATEGIES["fedavg"](config, roster, ServerState(0, START))
    grid = MemoryGrid({100 + i: node(name) for i, name in enumerate(names)})
    strategy.start(grid, ArrayRecord(), num_rounds=rounds)
    return drawn


@settings(max_examples=25, deadline=None)
@given(
    rounds=st.integers(1, 30),
    lost=st.sets(st.integers(1, 30), max_size=8),
    size=st.integers(PER_ROUND, 100),
    seed=st.integers(0, 1000),
)
def test_no_record_comes_twice_before_all_were_seen(
    rounds: int, lost: set[int], size: int, seed: int
) -> None:
    for drawn in accepted_draws(rounds, lost, size, seed).values():
        for start in range(0, len(drawn), size):
            of_one_pass = drawn[start : start + size]
            assert len(set(of_one_pass)) == len(of_one_pass)


@pytest.mark.parametrize("lost", [set(), {4, 9}])
def test_what_a_client_sees_in_a_hundred_rounds(lost: set[int]) -> None:
    """Each of 97 records is seen as often as any other, give or take one."""
    for drawn in accepted_draws(100, lost, 97, 0).values():
        counts = np.bincount(drawn, minlength=97)
        assert counts.max() - counts.min() <= 1
