"""The loop over a channel that is no Flower, and another loop beside it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from fedllm_flwr.config.schema import changed
from fedllm_flwr.federation.channel import NoReplyError, Reply, RequestKind
from fedllm_flwr.federation.messages import Assignment, LocalScores, Update
from fedllm_flwr.federation.recorder import Recorder, RoundReport
from fedllm_flwr.federation.roster import Roster
from fedllm_flwr.federation.rounds import OpenRound, Rounds
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Groups
from strategy_runs import SIZES, START, config_of, roster_of

TARGETS = {"ant": 1.0, "bee": 2.0, "cat": 4.0}


class Direct:
    """Clients that move half of the way to their target; those in `away` do not answer."""

    def __init__(self, away: frozenset[str] = frozenset()) -> None:
        self.roster: Roster = roster_of()
        self.away = away
        self.requests: list[RequestKind] = []

    def settle(self) -> None:
        """All stay where they are."""

    def exchange(
        self,
        request: RequestKind,
        assignments: Mapping[str, Assignment],
        timeout_s: float,
        expected: Groups,
    ) -> Iterator[Reply]:
        self.requests.append(request)
        for name, assignment in assignments.items():
            if name in self.away:
                yield Reply(name, NoReplyError("asleep"))
            elif request is RequestKind.EVALUATE:
                yield Reply(name, LocalScores({"loss": 1.0}, 3))
            else:
                yield Reply(name, work(name, assignment))

    def take_notes(self) -> list[str]:
        return []


def work(name: str, assignment: Assignment) -> Update:
    delta = {key: (TARGETS[name] - v) / 2 for key, v in assignment.params.items()}
    contributed = {"control_delta": delta} if "control" in assignment.sent else {}
    return Update(delta, 1, {"loss": 1.0}, contributed)


def rounds_of(tmp_path: Path, name: str = "fedavg", **changes: object) -> Rounds:
    config = config_of(name, **changes)  # type: ignore[arg-type]
    return Rounds(find_rule(config.algorithm), config, Recorder(), tmp_path)


def mean_target(names: tuple[str, ...]) -> float:
    return sum(SIZES[n] * TARGETS[n] for n in names) / sum(SIZES[n] for n in names)


def test_the_loop_needs_no_flower(tmp_path: Path) -> None:
    rounds, channel = rounds_of(tmp_path), Direct()
    state = rounds.begin(ServerState(0, START), channel.roster)
    final = rounds.run(state, channel, last=12, timeout_s=1.0)
    for value in final.params.values():
        np.testing.assert_allclose(value, mean_target(("ant", "bee", "cat")), atol=2e-3)
    assert channel.requests == [RequestKind.TRAIN] * 12


def test_a_client_that_does_not_answer_is_left_out(tmp_path: Path) -> None:
    rounds, channel = rounds_of(tmp_path, min_replies=2), Direct(frozenset({"cat"}))
    state = rounds.begin(ServerState(0, START), channel.roster)
    final = rounds.run(state, channel, last=14, timeout_s=1.0)
    for value in final.params.values():
        np.testing.assert_allclose(value, mean_target(("ant", "bee")), atol=1e-3)
    assert final.clients["cat"].round == 0


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "scaffold"])
def test_a_client_left_out_is_one_that_has_not_answered(tmp_path: Path, name: str) -> None:
    class Listening(Recorder):
        def on_round(self, state: ServerState, report: RoundReport) -> None:
            self.report = report

    listening, config = Listening(), config_of(name, min_replies=2)
    config = changed(config, evaluation={"contribution": "leave_one_out"})
    rounds = Rounds(find_rule(config.algorithm), config, listening, tmp_path / "all")
    rounds.run(rounds.begin(ServerState(0, START), roster_of()), Direct(), last=1, timeout_s=1.0)
    for missing, others in (("cat", ("bee", "ant")), ("ant", ("bee", "cat"))):
        fewer = Rounds(find_rule(config.algorithm), config, Recorder(), tmp_path / missing)
        state = fewer.begin(ServerState(0, START), roster_of())
        expected = fewer.run(state, Direct(frozenset({missing})), last=1, timeout_s=1.0).adapter
        assert listening.report.adapter_with is not None
        found = listening.report.adapter_with(others)
        assert {key: value.tobytes() for key, value in found.items()} == {
            key: value.tobytes() for key, value in expected.items()
        }


def buffered(rounds: Rounds, state: ServerState, roster: Roster, steps: int, size: int) -> Groups:
    """A buffered asynchronous loop (Nguyen et al. 2022): a step after each `size` replies.

    Clients take turns; each works on the adapter of when it was asked, which is one step old.
    """
    stale, names = state, sorted(roster)
    for step in range(steps):
        opened = rounds.open(state, roster, state.round + 1)
        for turn in range(size):
            name = names[(step * size + turn) % len(names)]
            old = rounds.open(stale, roster, state.round + 1).assignments[name]
            opened.take(Reply(name, work(name, old)))
        stale, state = state, opened.next_state()
    return state.params  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold"])
def test_an_asynchronous_loop_carries_out_the_same_rules(name: str, tmp_path: Path) -> None:
    rounds, roster = rounds_of(tmp_path, name), roster_of()
    state = rounds.begin(ServerState(0, START), roster)
    final = buffered(rounds, state, roster, steps=60, size=3)
    for value in final.values():
        assert np.isfinite(value).all()
        assert 0.5 < float(value.mean()) < 4.5  # between the targets, or near


def test_an_open_round_counts_what_it_has_taken(tmp_path: Path) -> None:
    rounds, roster = rounds_of(tmp_path), roster_of()
    state = rounds.begin(ServerState(0, START), roster)
    opened: OpenRound = rounds.open(state, roster, 1)
    opened.take(Reply("ant", work("ant", opened.assignments["ant"])))
    opened.take(Reply("bee", NoReplyError("asleep")))
    assert list(opened.report.metrics) == ["ant"]
    assert opened.report.failures == {"bee": "asleep"}


def test_a_report_has_norms_and_cosines_of_updates_but_not_of_private_ones(tmp_path: Path) -> None:
    rounds, roster = rounds_of(tmp_path), roster_of()
    privacy = {"unit": "client", "sampling": "visible", "noise_multiplier": 0.0}
    private = Rounds(rounds.rule, changed(rounds.config, privacy=privacy), Recorder(), tmp_path)
    for made in (rounds, private):
        opened = made.open(made.begin(ServerState(0, START), roster), roster, 1)
        updates = {name: work(name, opened.assignments[name]) for name in TARGETS}
        for name, update in updates.items():
            opened.take(Reply(name, update))
        opened.next_state()
        if made is private:
            assert opened.report.norms == opened.report.cosines == {}
            continue
        flat = {
            n: np.concatenate([v.ravel() for v in u.delta.values()]) for n, u in updates.items()
        }
        mean = sum(SIZES[name] * value for name, value in flat.items())
        for name, value in flat.items():
            norm = np.linalg.norm(value)
            assert opened.report.norms[name] == pytest.approx(norm)
            exact = value @ mean / norm / np.linalg.norm(mean)
            assert opened.report.cosines[name] == pytest.approx(exact, abs=0.1)
