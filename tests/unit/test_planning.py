"""The plan of a run: what it says of messages is what the algorithm sends."""

from types import SimpleNamespace

import pytest

from fedllm_flwr.federation.strategies import STRATEGIES
from fedllm_flwr.federation.strategies.scaffold import Scaffold
from fedllm_flwr.server.planning import _wire
from memory_grid import MemoryGrid
from strategy_runs import START, config_of, nodes_of, roster_of, run


class Corrected(Scaffold):
    """Control variates under a name that the plan does not know them by."""


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "local", "fedadam", "fedprox"])
def test_bytes_are_those_that_travel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "fedprox", Corrected)
    config, prepared = config_of(name), SimpleNamespace(initial=START, reference=None)
    plan = _wire(config, prepared, roster_of())  # type: ignore[arg-type]
    _, (report,) = run(config, MemoryGrid(nodes_of()))
    assert plan["bytes_down"] * len(report.metrics) == report.bytes_down
    assert plan["bytes_up"] * len(report.metrics) == report.bytes_up
