"""A run does each piece of work as often as it has to: counted, where a clock would be noise."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.data import token_cache
from fedllm_flwr.models import adapted_model
from fedllm_flwr.simulation.inprocess import InProcessGrid
from tiny_runs import records, run_tiny

ROUNDS, SAMPLED, STEPS, BATCH = 2, 2, 2, 4  # of `tiny_runs.TINY`


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counter[str]:
    """How often functions of interest are called; no cache is left from other runs."""
    found: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            found[name] += 1
            return function(*arguments, **named)

        return call

    def messages(grid: InProcessGrid, some: Any) -> Any:
        sent = list(some)
        found["messages"] += len(sent)
        return push(grid, sent)

    push = InProcessGrid.push_messages
    monkeypatch.setattr(InProcessGrid, "push_messages", messages)
    monkeypatch.setattr(adapted_model, "_process_models", adapted_model.ModelCache())
    monkeypatch.setattr(adapted_model, "load_base", counted("base models", adapted_model.load_base))
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        token_cache, "save_chunks", counted("tokenised sets", token_cache.save_chunks)
    )
    return found


def test_two_rounds(counts: Counter[str], tmp_path: Path) -> None:
    run = run_tiny(tmp_path / "run", "training.max_length=128", "seed=11")
    assert counts["base models"] == 1
    assert counts["tokenised sets"] == 2  # training and held-out records, once each
    assert counts["messages"] == ROUNDS * SAMPLED  # simulated clients are not asked who they are
    wire = 2 * 110_592  # bytes of the adapter in bfloat16
    for record in records(run)[1:]:
        assert record["bytes_down"] == record["bytes_up"] == SAMPLED * wire
        for client in record["clients"].values():
            assert client["steps"] == STEPS
            assert client["computed_tokens"] <= 1.25 * client["tokens"]  # little padding
