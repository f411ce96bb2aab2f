"""Many simulated clients behind few nodes."""

from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedllm_flwr.client.simulated import noted_index
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import FederationConfig
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.census import known
from fedllm_flwr.federation.exchange import receive, send
from fedllm_flwr.federation.inbox import open_inbox
from fedllm_flwr.simulation.grid import SimulationGrid
from fedllm_flwr.simulation.inprocess import InProcessGrid

SIZES = {f"client-{i}": i + 1 for i in range(10)}


class Asked(ClientApp):
    """Notes which node has answered for which client."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, str | None]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        self.seen.append((context.node_id, noted_index(message.content)))
        return Message(RecordDict(), reply_to=message)


def test_replies_come_from_the_clients_that_were_asked(tmp_path: Path) -> None:
    app = Asked()
    grid = SimulationGrid(InProcessGrid(app, 3), 10, tmp_path)
    roster = known(grid, Config(), SIZES).clients
    assert {name: client.info.num_examples for name, client in roster.items()} == SIZES

    wanted = [roster[f"client-{i}"].node_id for i in (9, 0, 6)]  # two of them behind one node
    shared = RecordDict()
    node_ids = send(grid, [Message(shared, node_id, "train") for node_id in wanted])
    assert list(node_ids.values()) == wanted
    replies = list(receive(open_inbox(grid), node_ids, 10.0))
    assert [reply.metadata.src_node_id for reply in replies] == wanted
    assert [index for _, index in app.seen] == ["9", "0", "6"]
    assert {node_id for node_id, _ in app.seen} == {1}


def test_nodes_that_never_come_are_missed(tmp_path: Path) -> None:
    config = Config(federation=FederationConfig(start_timeout_s=0.1))
    with pytest.raises(FederationError, match="0 of 10 clients connected within 0 s"):
        known(SimulationGrid(InProcessGrid(Asked(), 0), 10, tmp_path), config, SIZES)
