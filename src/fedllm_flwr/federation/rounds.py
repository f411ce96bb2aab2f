"""The rounds of a run: a plain loop over a rule, a channel to the clients and a recorder.

A round consists of up to four exchanges with the clients: the sampled clients train; under secure
aggregation, they sign who is left and help to unmask the sum; and with ``evaluation.clients``, all
clients score the new adapter. This module does not depend on Flower, on the clients' disks, or on
where clients run.
"""

import math
import secrets
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedllm_flwr.config import Config
from fedllm_flwr.config.participation import min_replies
from fedllm_flwr.config.schema import PrivacyConfig
from fedllm_flwr.data.poison import attackers
from fedllm_flwr.errors import FederationError, LostDownloadError, NotFiniteError
from fedllm_flwr.factors import Folded, aggregation_error, cut, is_a, is_b, is_core, rank_of
from fedllm_flwr.federation.attacks import attacked
from fedllm_flwr.federation.channel import Channel, NoReplyError, Reply, RequestKind
from fedllm_flwr.federation.combine import Combiner, RunningMean
from fedllm_flwr.federation.directions import UpdateDirections
from fedllm_flwr.federation.downlink import DOWNLINK, Downlink
from fedllm_flwr.federation.masked_round import (
    MaskedContributions,
    noise_deviation,
    num_words,
    session_of,
)
from fedllm_flwr.federation.mechanism import mechanism_of
from fedllm_flwr.federation.messages import (
    FROZEN,
    Acknowledged,
    Assignment,
    LocalScores,
    MaskedUpdate,
    Update,
    check_metrics,
)
from fedllm_flwr.federation.recorder import Recorder, RoundReport
from fedllm_flwr.federation.roster import Roster, check_roster
from fedllm_flwr.federation.rule import Counts, Rule
from fedllm_flwr.federation.secure.graph import Session
from fedllm_flwr.federation.secure.keys import KeyCard
from fedllm_flwr.federation.secure.site import Opened, Signed, Unmask
from fedllm_flwr.federation.server_copies import ServerCopies
from fedllm_flwr.federation.spool import Spool
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.federation.updates.cast import wire_bytes
from fedllm_flwr.federation.updates.transform import Chain, Passage
from fedllm_flwr.params import (
    Array,
    Groups,
    Moved,
    Params,
    check_like,
    digest,
    full_like,
    num_values,
)
from fedllm_flwr.plugins import COMBINERS
from fedllm_flwr.training.schedule import cosine_learning_rate

_MOST_KEPT = 2**30  # bytes of a round's adapters, up to which the aggregation error is computed

_MOST_DROPPED = 3  # consecutive rounds, under secure aggregation


class Rounds:
    """The loop over the rounds of a run, and what all rounds share.

    Args:
        copies: directory for the server's copies of client memory.
    """

    def __init__(self, rule: Rule, config: Config, recorder: Recorder, copies: Path) -> None:
        self.rule = rule
        self.config = config
        self.recorder = recorder
        self.secure = config.privacy.secure_aggregation
        # Under secure aggregation the server sees no single contribution, so it copies no memory.
        self.copies = ServerCopies(copies, {} if self.secure else rule.contributes)
        self._dropped = 0  # consecutive rounds
        self.chain = Chain.of(config)
        self.downlink = Downlink.of(config)
        self.mechanism = mechanism_of(config, copies / "releases.jsonl")

    def run(self, state: ServerState, channel: Channel, last: int, timeout_s: float) -> ServerState:
        """Run the remaining rounds, ``state.round + 1`` to `last`; return the state after them.

        Args:
            timeout_s: seconds to wait for the replies of an exchange.

        Raises:
            FederationError: a round cannot be completed; the rounds before it are recorded.
        """
        for current in range(state.round + 1, last + 1):
            if self.recorder.has_converged():
                break
            started = time.monotonic()
            channel.settle()
            if self.mechanism.is_spent(state, channel.roster):
                break
            opened = self.open(state, channel.roster, current)
            report = opened.report
            self.recorder.on_start_round(current, report.sampled)
            replies = channel.exchange(
                RequestKind.TRAIN,
                opened.assignments,
                timeout_s,
                self.expected(state.params, current),
            )
            state = self.close(opened, replies, channel, timeout_s)
            report.seconds = time.monotonic() - started
            if self.config.evaluation.clients:
                questions = self.questions(state, channel.roster)
                answers = channel.exchange(RequestKind.EVALUATE, questions, timeout_s, {})
                note_scores(report, answers)
            self.recorder.on_round(state, report)
        return state

    def begin(self, state: ServerState, roster: Roster) -> ServerState:
        """Add an entry for every client, and the rule's initial tensors, to `state`.

        Raises:
            FederationError: there are too few clients, they announce too many examples, or the
                server has lost its copy of a client's memory in a resumed run.
        """
        known = sorted({*state.clients, *roster})
        clients = {name: state.clients.get(name, Acknowledged()) for name in known}
        self.copies.require(clients)
        state = replace(self.rule.start(state, len(clients)), clients=clients)
        if DOWNLINK not in state.tensors:
            state = self.with_downlink(state, {})
        check_roster(roster, self.config)
        self._check_ranks(roster)
        return state

    def _check_ranks(self, roster: Roster) -> None:
        """Reject clients whose adapters have a rank that the algorithm cannot combine.

        Raises:
            FederationError: names the first such client and its rank.
        """
        rank = self.config.lora.r
        for name, client in roster.items():
            if not 0 <= (own := client.info.rank) <= rank:
                raise FederationError(
                    f"{name} trains adapters of rank {own}, the run has lora.r={rank}"
                )
            if own % rank and not self.rule.any_rank:
                raise FederationError(
                    f"{name} trains adapters of rank {own}, and algorithm="
                    f"{self.config.algorithm.name} needs lora.r={rank} of all; use "
                    "algorithm=flexlora, hetlora or flora."
                )

    def open(self, state: ServerState, roster: Roster, server_round: int) -> "OpenRound":
        """Sample the clients of a round and prepare their assignments."""
        names = self.mechanism.choose(roster, server_round)
        learning_rate = cosine_learning_rate(
            self.config.training, server_round, self.config.federation.num_rounds
        )
        ranks = self._ranks(state, {name: roster[name] for name in names})
        assignments = self._assignments(state, ranks, server_round, learning_rate)
        config = self.mechanism.config_for(roster)
        session = None
        if self.secure:
            session = self._session(config.privacy, state.run, roster, names, server_round)
            shared = self.shared(state.params, server_round)
            noise_deviation(session, num_words(shared, self.rule.contributes, state.params) - 1)
        assignments = {
            name: replace(each, config=config, session=session)
            for name, each in assignments.items()
        }
        bytes_down = sum(self.wire_bytes(each.on_wire) for each in assignments.values())
        lying = [name for name in attackers(self.config, roster) if name in names]
        report = RoundReport(server_round, names, attackers=lying, bytes_down=bytes_down)
        return OpenRound(self, state, roster, assignments, report, session)

    def close(
        self,
        opened: "OpenRound",
        replies: Iterable[Reply],
        channel: Channel | None = None,
        timeout_s: float | None = None,
    ) -> ServerState:
        """Combine the usable replies as they arrive, then take the server step.

        Under secure aggregation two more exchanges unmask the sum. If one fails, the round is
        dropped: only its number changes in the state.

        Raises:
            FederationError: fewer than ``federation.min_replies`` replies are usable, or the server
                step gives values that are not finite.
        """
        limit = self.config.federation.round_timeout_s if timeout_s is None else timeout_s
        if channel is not None:
            replies = opened.asked_again(replies, channel, limit)
        lying = opened.report.attackers
        for reply in attacked(replies, self.config, lying, opened.report.round):
            opened.take(reply)
        if channel is not None:
            opened.report.ignored += channel.take_notes()
        try:
            opened.report.require(self.replies_needed(opened))
        except FederationError:
            self.recorder.on_failed_round(opened.report)
            raise
        if not self.secure:
            return opened.next_state()
        try:
            assert channel is not None
            opened.agree(channel, limit)
            self.mechanism.open(opened.state, channel.roster)
            opened.unmask(channel, limit)
            opened.open_sum()
        except FederationError as error:
            return self._drop(opened, error)
        self._dropped = 0
        return opened.next_state()

    def _drop(self, opened: "OpenRound", error: FederationError) -> ServerState:
        """Drop a failed round: return the state before it, with the round number advanced.

        Raises:
            FederationError: `_MOST_DROPPED` consecutive rounds were dropped.
        """
        report, reason = opened.report, f"the round was dropped: {error}"
        report.failures |= dict.fromkeys(report.metrics, reason)
        report.metrics, report.num_examples = {}, {}
        self._dropped += 1
        if self._dropped >= _MOST_DROPPED:
            self.recorder.on_failed_round(report)
            raise FederationError(
                f"round {report.round}: {self._dropped} rounds in succession were dropped; the "
                f"last one: {error}"
            ) from error
        state = replace(opened.state, round=report.round)
        # The release is charged even if unmasking failed.
        report.spent = self.mechanism.spent(opened.roster)
        report.is_last = self.mechanism.is_spent(state, opened.roster)
        return state

    def questions(self, state: ServerState, roster: Roster) -> dict[str, Assignment]:
        """The requests that ask all clients to score the adapter of `state`."""
        ranks, run = self._ranks(state, roster), state.run if self.rule.personal else ""
        return {
            name: replace(
                assignment,
                sent=self._scored_with(assignment.sent, state),
                run=run,
                download=None,  # the adapter itself is scored
            )
            for name, assignment in self._assignments(state, ranks, state.round, 0.0).items()
        }

    def _ranks(self, state: ServerState, roster: Roster) -> dict[str, int]:
        """Ranks of the clients' adapters by name; 0 means the rank of the global adapter."""
        own = self.config.lora.r
        most = {name: client.info.rank or own for name, client in roster.items()}
        return {name: self.rule.rank(state, name, rank) % own for name, rank in most.items()}

    @staticmethod
    def _scored_with(sent: Groups, state: ServerState) -> Groups:
        """Those groups of `sent` that a client needs in order to score the adapter."""
        return {group: params for group, params in sent.items() if group in (*state.sent, FROZEN)}

    def expected(self, params: Params, server_round: int) -> Groups:
        """Names and shapes of the reply of a client that starts from `params`, by group."""
        if self.secure:
            size = num_words(self.shared(params, server_round), self.rule.contributes, params)
            return {"masked": {"vector": np.broadcast_to(np.float32(0), (size,))}}
        return self.chain.expected(self.uncompressed(params, server_round))

    def uncompressed(self, params: Params, server_round: int) -> Groups:
        """Names and shapes of a client's contributions before any update transform, by group."""
        groups = dict.fromkeys(self.rule.contributes, params)
        return {"delta": self.shared(params, server_round), **groups}

    def shared(self, params: Params, server_round: int) -> Params:
        """Those tensors of `params` whose change clients send back in a round."""
        return {n: value for n, value in params.items() if self.rule.shares(n, server_round)}

    def replies_needed(self, opened: "OpenRound") -> int:
        """Minimum number of usable replies; for a Poisson sample, more than half of it."""
        if self.config.privacy.sampling == "poisson" and self.config.privacy.unit == "client":
            return len(opened.assignments) // 2 + 1 if opened.assignments else 0
        return min_replies(self.config, len(opened.roster))

    def weight(self, update: Update, num_examples: int) -> float:
        """Weight of a client's update in the mean of its round.

        Args:
            num_examples: n_i, as announced by the client.
        """
        weights = {"examples": num_examples, "used": update.num_examples, "uniform": 1}
        return float(weights[self.weighting()])

    def weighting(self) -> str:
        """How updates are weighted: ``examples``, ``used`` or ``uniform``."""
        if self.config.privacy.unit == "client":
            return "uniform"  # the clipping bound of an update then bounds its share of the sum
        chosen = self.config.algorithm.weighting
        return self.rule.weighting[self.rule.variant] if chosen == "auto" else chosen

    def combiner(self, state: ServerState) -> Combiner:
        """A new combiner for the updates of the round after `state`."""
        chosen = self.config.algorithm.combiner
        kind: Any = COMBINERS.find(self.rule.combiner if chosen == "auto" else chosen)
        made: Combiner = kind.of(self.config, state)
        return made

    def keeps_adapters(self, params: Params, num_clients: int) -> bool:
        """Whether to keep a round's client adapters.

        The rule may need them (`Rule.stacks`), and so does the aggregation error.
        """
        wanted = self.config.evaluation.aggregation_error
        if self.rule.stacks:
            return True
        # Under client-level privacy the aggregation error would be a release without noise.
        if not self.rule.aggregates or self.config.privacy.unit == "client":
            return False
        if wanted is None:
            wanted = num_clients * sum(value.nbytes for value in params.values()) <= _MOST_KEPT
        return wanted and all(is_a(name) or is_b(name) or is_core(name) for name in params)

    def oldest_checkpoint(self, state: ServerState) -> int:
        """Round of the oldest checkpoint that the server may resume from."""
        oldest = self.recorder.oldest_checkpoint()
        return state.round if oldest is None else oldest

    def bytes_per_client(self, state: ServerState) -> tuple[int, int]:
        """Bytes of tensors that a client receives and sends in the last round."""
        last = self.config.federation.num_rounds
        (assignment,) = self._assignments(state, {"": 0}, last, 0.0).values()
        return self.wire_bytes(assignment.on_wire), self.bytes_up(state.params, last)

    def bytes_up(self, params: Params, server_round: int) -> int:
        """Bytes of tensors in the reply of a client that starts from `params`."""
        up = self.expected(params, server_round)
        if self.secure:
            return num_values(up["masked"]) * self.config.privacy.secure_ring // 8
        return self.wire_bytes(up)

    def _session(
        self,
        privacy: PrivacyConfig,
        run: str,
        roster: Roster,
        names: list[str],
        server_round: int,
    ) -> Session:
        """A secure-aggregation session for a round; each attempt at a round has its own id."""
        weighting = self.weighting()
        sizes = [roster[name].info.num_examples for name in names]
        return session_of(
            privacy,
            id=f"{run}/{server_round}/{secrets.token_hex(16)}",
            cards={name: KeyCard.from_text(roster[name].info.card) for name in names},
            weighting=weighting,
            largest_weight=1.0 if weighting == "uniform" else float(max(sizes)),
        )

    def wire_bytes(self, groups: Groups) -> int:
        """Bytes that groups of tensors take on the wire."""
        dtype = self.config.communication.dtype
        return sum(wire_bytes(params, dtype) for params in groups.values())

    def _assignments(
        self, state: ServerState, ranks: Mapping[str, int], server_round: int, learning_rate: float
    ) -> dict[str, Assignment]:
        """The clients' assignments by name; equal tensors are the same objects in all of them.

        Args:
            ranks: ranks of the clients' adapters by name; 0 means that of the global adapter.
        """
        oldest, frozen = self.oldest_checkpoint(state), state.tensors.get(FROZEN, {})
        downloads = self.downlink.downloads(state, ranks) if self.downlink else {}
        made: dict[tuple[int, int], tuple[Params, str]] = {}
        found = {}
        for name, rank in ranks.items():
            sent = {"params": state.params, **state.sent, **self.rule.send(state, name)}
            params = sent.pop("params")
            if (key := (id(params), rank)) not in made:
                made[key] = self._without_fixed(cut(params, rank) if rank else params)
            found[name] = Assignment(
                round=server_round,
                params=made[key][0],
                learning_rate=learning_rate,
                config=self.config,
                sent={**sent, FROZEN: frozen} if rank_of(frozen) else sent,
                run=state.run,
                acknowledged=state.clients.get(name, Acknowledged()),
                oldest_checkpoint=oldest,
                seeded=made[key][1],
                download=downloads.get(name),
            )
        return found

    def with_downlink(self, state: ServerState, before: Groups) -> ServerState:
        """`state` with what the clients of the next round receive if the downlink is compressed.

        Args:
            before: ``tensors`` of the state before.

        Raises:
            FederationError: the algorithm sends clients different tensors.
        """
        if self.downlink is None:
            return state
        common = self.rule.send(state, "")
        for name in state.clients:
            own = self.rule.send(state, name)
            if "params" in own or any(own[group] is not common.get(group) for group in own):
                raise FederationError(
                    f"algorithm={self.config.algorithm.name} sends clients different tensors; set "
                    "communication.downlink=whole."
                )
        params, _ = self._without_fixed(state.params)
        sent = {"params": params, **state.sent, **common}
        rest = {n: each for n, each in state.tensors.items() if n.partition(".")[0] != DOWNLINK}
        found = self.downlink.advanced(before, sent, state.round + 1)
        return replace(state, tensors={**rest, **found})

    def _without_fixed(self, params: Params) -> tuple[Params, str]:
        """`params` without the tensors that clients draw themselves, and their digest or ""."""
        fixed = {n: value for n, value in params.items() if self.rule.is_fixed(n)}
        if not fixed or self.config.init_adapter is not None:
            return params, ""
        return {n: value for n, value in params.items() if n not in fixed}, digest(fixed)


@dataclass(frozen=True)
class _Accepted:
    """What a round keeps of an accepted update: tensors in its spool."""

    start: Params
    delta: Mapping[str, Array]
    contributed: Mapping[str, Mapping[str, Array]]
    weight: float


@dataclass
class OpenRound:
    """A round in progress: its assignments, and the replies combined so far."""

    rounds: Rounds
    state: ServerState
    roster: Roster
    assignments: dict[str, Assignment]
    report: RoundReport
    session: Session | None = None

    def __post_init__(self) -> None:
        self._masked: MaskedContributions | None = None
        self._opened: dict[str, Params] = {}
        if self.session is not None:
            like, contributes = self.state.params, self.rounds.rule.contributes
            shared = self.rounds.shared(like, self.report.round)
            self._masked = MaskedContributions(self.session, shared, contributes, like)
        self._combiner = self.rounds.combiner(self.state)
        self._sums = {group: RunningMean() for group in self.rounds.rule.contributes}
        self._weight = 0.0
        self._within: list[bool] = []
        self._directions = UpdateDirections(self.state.params)
        self._keeps = self.rounds.keeps_adapters(self.state.params, len(self.assignments))
        config = self.rounds.config.evaluation
        self._repeats = config.contribution != "none" and self.rounds.rule.aggregates
        self._spool = Spool()
        self._kept: dict[str, _Accepted] = {}  # by client

    def asked_again(
        self, replies: Iterable[Reply], channel: Channel, timeout_s: float
    ) -> Iterator[Reply]:
        """`replies`; clients that cannot follow the steps of their download are asked once more.

        Args:
            timeout_s: seconds to wait for their second replies.
        """
        lost = []
        for reply in replies:
            download = self.assignments[reply.client].download
            has_steps = download is not None and download.whole is None
            if has_steps and isinstance(reply.answer, LostDownloadError):
                lost.append(reply.client)
            else:
                yield reply
            del reply  # otherwise it stays in memory until the next one arrives
        if not lost:
            return
        rounds, report, whole = self.rounds, self.report, Downlink.whole(self.state)
        again = {name: replace(self.assignments[name], download=whole) for name in lost}
        report.bytes_down += sum(rounds.wire_bytes(each.on_wire) for each in again.values())
        report.ignored += [f"{name}: asked again, with the whole adapter" for name in lost]
        expected = rounds.expected(self.state.params, report.round)
        yield from channel.exchange(RequestKind.TRAIN, again, timeout_s, expected)

    def take(self, reply: Reply) -> None:
        """Validate a whole reply before combining it with the others."""
        report, name, answer = self.report, reply.client, reply.answer
        try:
            if isinstance(answer, FederationError):
                raise answer
            update: Update | MaskedUpdate
            if self._masked is not None:
                update = self._add(name, answer, self._masked)
            else:
                if not isinstance(answer, Update):
                    raise FederationError("an answer that was not asked for")
                update = self._combine(name, answer)
        except FederationError as error:
            report.failures[name] = str(error)
            if isinstance(answer, Update | MaskedUpdate):
                report.refused.add(name)
            if isinstance(error, NotFiniteError):
                report.diverged.add(name)
            if not isinstance(error, NoReplyError):
                self.rounds.recorder.on_reply(report.round, name, None)
            return
        report.metrics[name] = update.metrics
        report.num_examples[name] = update.num_examples
        report.bytes_up += self.rounds.bytes_up(self._start(name), report.round)
        acknowledged = self.state.clients[name].round
        if isinstance(update, Update) and update.lost and acknowledged:
            report.lost[name] = acknowledged
        if isinstance(update, Update) and not self.rounds.rule.aggregates:
            self.rounds.recorder.on_update(report.round, name, update.delta, acknowledged)
        self.rounds.recorder.on_reply(report.round, name, update.metrics.get("loss", math.nan))

    def next_state(self) -> ServerState:
        """Take the server step.

        Raises:
            FederationError: the step gives values that are not finite.
        """
        rounds, state, report = self.rounds, self.state, self.report
        combined = dict(self._opened)
        if self._masked is None:
            combined |= self._combined(self._combiner, self._sums)
        counts = self._counts(report.metrics, self._weight)
        released, tensors = rounds.mechanism.release(state, self.roster, combined, self._within)
        new = rounds.rule.step(state, released, counts)
        new = replace(new, tensors={**new.tensors, **self._combiner.history})
        report.cut = dict(self._combiner.cut)
        report.norms, report.cosines = self._directions.norms, self._directions.cosines()
        params = {n: value.astype(np.float32, copy=False) for n, value in new.params.items()}
        try:
            check_like(params, state.params)
        except FederationError as error:
            eta = rounds.config.algorithm.eta
            raise FederationError(
                f"round {report.round}: the server step failed, {error}; lower algorithm.eta="
                f"{eta:g} or training.learning_rate."
            ) from error
        accepted = {
            name: Acknowledged(report.round, state.clients[name].updates + 1)
            for name in report.metrics
        }
        done = replace(state, round=report.round)
        report.spent = rounds.mechanism.spent(self.roster)
        report.is_last = rounds.mechanism.is_spent(done, self.roster)
        new = replace(
            new,
            round=report.round,
            params=params,
            tensors={**new.tensors, **tensors},
            clients={**state.clients, **accepted},
        )
        new = rounds.with_downlink(new, state.tensors)
        if counts.adapters and rounds.rule.aggregates and not rounds.rule.estimates(report.round):
            adapters = [Folded(each) for each in counts.adapters]
            before = state.tensors.get(FROZEN, {})
            report.aggregation_error = aggregation_error(
                adapters, counts.shares, before, new.adapter
            )
        if self._repeats:
            report.adapter_with = self.adapter_with
        return new

    def adapter_with(self, names: Collection[str]) -> Params:
        """The adapter after this round if only these clients had replied.

        It uses the round's combiner, weights and server step, from the state before the round.

        Raises:
            FederationError: the combiner needs more updates.
        """
        rounds, state = self.rounds, self.state
        if not names:
            return state.adapter
        combiner = rounds.combiner(state)
        sums = {group: RunningMean() for group in self._sums}
        total = 0.0
        for name in sorted(names):
            each = self._kept[name]
            if not rounds.rule.any_rank:
                combiner.add(name, dict(each.delta), each.weight)
            for group, change in each.contributed.items():
                sums[group].add(change, 1.0)
            total += each.weight
        combined = self._combined(combiner, sums)
        adapter = rounds.rule.step(state, combined, self._counts(names, total)).adapter
        return {name: value.astype(np.float32) for name, value in adapter.items()}

    def _combined(self, combiner: Combiner, sums: Mapping[str, RunningMean]) -> dict[str, Params]:
        """The groups of tensors that the server step receives, from unmasked updates."""
        rounds, state = self.rounds, self.state
        combined = {group: total.sum_over(len(state.clients)) for group, total in sums.items()}
        if not rounds.rule.any_rank:
            combined["delta"] = combiner.combined() or full_like(
                rounds.shared(state.params, self.report.round), 0.0
            )
        return combined

    def _counts(self, replied: Collection[str], weight: float) -> Counts:
        """Counts of a round in which the clients `replied`, with the given total weight."""
        names = sorted(name for name in replied if self._keeps and name in self._kept)
        adapters = [Moved(self._kept[name].start, self._kept[name].delta) for name in names]
        shares = [self._kept[name].weight / weight for name in names]
        return Counts(len(replied), len(self.state.clients), weight, adapters, shares, names)

    def _start(self, name: str) -> Params:
        """The adapter that a client starts a round from, including what it draws from the seed."""
        sent = self.assignments[name]
        return {**self.state.params, **sent.params} if sent.seeded else sent.params

    def agree(self, channel: Channel, timeout_s: float) -> None:
        """Ask the clients whose vectors have arrived to sign the list of them.

        Raises:
            FederationError: too few vectors have arrived.
        """
        assert self._masked is not None
        self._ask(channel, RequestKind.SIGN, self._masked.sum.lists(), timeout_s)

    def unmask(self, channel: Channel, timeout_s: float) -> None:
        """Ask the clients that have signed the list for shares of the masks.

        Raises:
            FederationError: too few have signed it.
        """
        assert self._masked is not None
        self._ask(channel, RequestKind.UNMASK, self._masked.sum.questions(), timeout_s)

    def _ask(
        self, channel: Channel, kind: RequestKind, questions: Mapping[str, Unmask], timeout_s: float
    ) -> None:
        assert self._masked is not None
        for reply in channel.exchange(kind, questions, timeout_s, {}):
            try:
                if isinstance(reply.answer, FederationError):
                    raise reply.answer
                if not isinstance(reply.answer, Signed | Opened):
                    raise FederationError("an answer that was not asked for")
                self._masked.sum.take(reply.client, reply.answer)
            except FederationError as error:
                self.report.ignored.append(f"{reply.client}: unmasking: {error}")

    def open_sum(self) -> None:
        """Remove the masks from the sum.

        Raises:
            FederationError: too few shares have arrived, or honest clients cannot have such a sum.
        """
        assert self._masked is not None
        announced = {name: client.info.num_examples for name, client in self.roster.items()}
        num_clients = len(self.state.clients)
        self._opened, self._weight = self._masked.combined(num_clients, announced)
        self._within = [True] * len(self._masked.sum.survivors)

    def _add(self, name: str, update: object, masked: MaskedContributions) -> MaskedUpdate:
        if not isinstance(update, MaskedUpdate):
            raise FederationError("an update that is not masked")
        self._check_counts(name, update)
        masked.sum.add(name, update.words, update.sealed)
        return update

    def _check_counts(self, name: str, update: Update | MaskedUpdate) -> None:
        announced = self.roster[name].info.num_examples
        if not 1 <= update.num_examples <= announced:
            raise FederationError(
                f"num_examples={update.num_examples} is not in 1..{announced}, the announced range"
            )
        check_metrics(update.metrics, with_loss=not self.rounds.config.privacy.at_clients)

    def _combine(self, name: str, update: Update) -> Update:
        rounds, state, report = self.rounds, self.state, self.report
        self._check_counts(name, update)
        announced = self.roster[name].info.num_examples
        passage = Passage(name, report.round, rounds.config.seed)
        like = self._start(name)
        sent = {"delta": update.delta, **update.contributed}
        groups = dict(
            rounds.chain.server_end(sent, rounds.uncompressed(like, report.round), passage)
        )
        update = replace(update, delta=groups.pop("delta"), contributed=groups)
        check_like(update.delta, rounds.shared(like, report.round))
        changes = rounds.copies.accept(
            name,
            update,
            like,
            report.round,
            state.clients[name].round,
            rounds.oldest_checkpoint(state),
        )
        bounded = rounds.mechanism.bound(state, {"delta": update.delta, **changes})
        if bounded.unclipped:
            report.ignored.append(f"{name}: its update exceeds privacy.clip; clipped here")
        self._within.append(bounded.within)
        contribution = dict(bounded.groups)
        weight = rounds.weight(update, announced)
        delta = contribution.pop("delta")
        if not rounds.rule.any_rank:
            self._combiner.add(name, delta, weight)
        if rounds.config.privacy.unit != "client":  # norms and cosines would have no noise
            self._directions.add(name, update.delta, weight)
        if self._keeps or self._repeats:
            sums = {n: self._spool.keep(g) for n, g in contribution.items() if self._repeats}
            self._kept[name] = _Accepted(like, self._spool.keep(delta), sums, weight)
        self._weight += weight
        for group, change in contribution.items():
            self._sums[group].add(change, 1.0)
        return update


def note_scores(report: RoundReport, replies: Iterable[Reply]) -> None:
    """Add the clients' scores of the new adapter to the report of a round."""
    for reply in replies:
        if isinstance(reply.answer, LocalScores):
            report.scores[reply.client] = reply.answer.metrics
            report.num_scored[reply.client] = reply.answer.num_examples
        else:
            report.score_failures[reply.client] = str(reply.answer)
