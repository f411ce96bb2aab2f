"""The plan's bytes on the wire, against those of the messages of a round."""

from types import SimpleNamespace

import pytest

from fedllm_flwr.server.planning import bytes_per_client
from memory_grid import MemoryGrid
from strategy_runs import START, config_of, nodes_of, roster_of, run


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "local", "fedadam", "fedprox"])
def test_bytes_are_those_that_travel(name: str) -> None:
    config, prepared = config_of(name), SimpleNamespace(initial=START, sent={})
    down, up = bytes_per_client(config, prepared, roster_of())  # type: ignore[arg-type]
    _, (report,) = run(config, MemoryGrid(nodes_of()))
    assert down * len(report.metrics) == report.bytes_down
    assert up * len(report.metrics) == report.bytes_up
