"""Which round is the best, and when a run ends early: from records alone."""

from typing import Any

import pytest

from fedllm_flwr.reporting.metrics import (
    best_record,
    evaluations_without_better,
    has_converged,
    validation_losses,
    why_stopped,
)


def records(*losses: float | None, section: str = "eval") -> list[dict[str, Any]]:
    """A record per round; None: a round without a score."""
    return [
        {"round": i} if loss is None else {"round": i, section: {"loss": loss}}
        for i, loss in enumerate(losses)
    ]


def test_the_first_of_equal_rounds_is_the_best() -> None:
    best = best_record(records(2.0, None, 1.0, 1.0, 1.5))
    assert best is not None
    assert best["round"] == 2
    assert best_record(records(None, None)) is None
    assert best_record([]) is None


@pytest.mark.parametrize(
    ("losses", "waited"),
    [
        ((), 0),
        ((2.0,), 0),
        ((2.0, 1.0, 0.5), 0),
        ((2.0, 1.0, None, 1.0, None, 1.5), 2),
        ((2.0, 3.0, 1.0, 1.2), 1),
        ((1.0, float("nan"), float("inf")), 2),
    ],
)
def test_evaluations_are_counted_not_rounds(losses: tuple[float, ...], waited: int) -> None:
    assert evaluations_without_better(records(*losses)) == waited
    assert not has_converged(records(*losses), waited + 1)
    assert has_converged(records(*losses), waited)
    assert not has_converged(records(*losses), None)


def test_clients_scores_count_where_there_are_no_central_ones() -> None:
    own = records(None, 2.0, 1.0, 1.5, section="client_eval")
    assert validation_losses(own) == [(1, 2.0), (2, 1.0), (3, 1.5)]
    both = [
        {**item, **central} for item, central in zip(own, records(4.0, 3.0, 3.5, 2.0), strict=True)
    ]
    best = best_record(both)
    assert best is not None
    assert best["round"] == 3


def test_a_failed_attempt_at_the_best_round_is_no_score() -> None:
    tried = [*records(2.0), {"round": 1, "failed": True}, {"round": 1, "eval": {"loss": 1.0}}]
    assert best_record(tried) == {"round": 1, "eval": {"loss": 1.0}}


def test_why_stopped() -> None:
    text = why_stopped(records(2.0, 1.0, 1.5, 1.6), 3)
    assert text == (
        "stopped early after round 3: no lower loss in 2 evaluations, the best is in round 1"
    )
