"""The mechanics of a round, once: sampling, sending, streaming aggregation, state, evaluation."""

import random
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedllm_flwr.config import Config
from fedllm_flwr.config.participation import min_replies, num_sampled
from fedllm_flwr.config.schema import AlgorithmConfig
from fedllm_flwr.errors import FederationError, NotFiniteError
from fedllm_flwr.federation.aggregation import Aggregator
from fedllm_flwr.federation.census import Census
from fedllm_flwr.federation.control_copies import ControlCopies
from fedllm_flwr.federation.exchange import Roster, check_roster, receive, send, time_to_live
from fedllm_flwr.federation.inbox import NO_TENSORS, Expected, Inbox, open_inbox
from fedllm_flwr.federation.messages import Acknowledged, Task, Update
from fedllm_flwr.federation.moments import Moments
from fedllm_flwr.federation.replies import Asked, read_scores, read_update
from fedllm_flwr.federation.report import Hooks, RoundReport
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.federation.wire import pack_params, pack_tasks, wire_bytes
from fedllm_flwr.params import Params, add, check_like, derive_seed, full_like
from fedllm_flwr.training.local_terms import LocalCorrection
from fedllm_flwr.training.schedule import cosine_learning_rate


class FederatedStrategy(Strategy):
    """A Flower strategy whose subclasses state a server step and a local correction.

    Args:
        roster: the clients that take part, by name.
        state: where to go on from; ``state.round`` rounds are done already.
        hooks: called at the start of a round, after each reply and at the end of a round.
        known_clients: directory for what the server has to know of each client (SCAFFOLD); a
            temporary one unless given.

    Raises:
        FederationError: the clients are too few, or announce too many examples, or what a run that
            goes on has known of a client is gone.
    """

    default_weighting: ClassVar[Mapping[str, str]] = {
        "paper": "examples",
        "openfedllm": "examples",
    }
    clients_alone: ClassVar[bool] = False  # whether clients go on from their own adapters

    def __init__(
        self,
        config: Config,
        roster: Roster,
        state: ServerState,
        hooks: Hooks | None = None,
        known_clients: Path | None = None,
    ) -> None:
        self.config = config
        self.roster = roster
        self.hooks = hooks or Hooks()
        if known_clients is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="fedllm-known-clients-")
            known_clients = Path(self._temporary.name)
        self._control_copies = ControlCopies(known_clients, state.params)
        self.state = self._prepared(state)
        self._asked = Asked({}, roster)
        self._report = RoundReport(state.round, [])
        check_roster(roster, config)

    @abstractmethod
    def server_step(
        self, params: Params, delta: Params, moments: Moments
    ) -> tuple[Params, Moments]:
        """New adapter and optimizer moments from the mean update D = `delta` (float64)."""

    def local_correction(self) -> LocalCorrection:
        """Terms that clients add to their gradient; the proximal one is open to all algorithms."""
        return LocalCorrection(mu=self.algorithm.mu, as_openfedllm=self.as_openfedllm)

    def control_step(self, control: Params, change: Params) -> Params:
        """c + `change`, where `change` = sum_i(dc_i) / N (float64): c stays the mean of the c_i."""
        return add(control, change)

    @property
    def algorithm(self) -> AlgorithmConfig:
        """The algorithm's hyper-parameters."""
        return self.config.algorithm

    @property
    def as_openfedllm(self) -> bool:
        """Whether to reproduce OpenFedLLM's own update rather than the paper's."""
        return self.algorithm.variant == "openfedllm"

    @property
    def weighting(self) -> str:
        """``examples``, ``used`` or ``uniform``."""
        chosen = self.algorithm.weighting
        return self.default_weighting[self.algorithm.variant] if chosen == "auto" else chosen

    def sample(self, server_round: int) -> list[str]:
        """Names of the clients of a round: the same for the same seed and names."""
        seed = derive_seed(self.config.seed, "sampling", server_round)
        wanted = num_sampled(self.config, len(self.roster))
        return sorted(random.Random(seed).sample(sorted(self.roster), wanted))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages with this round's task to the sampled clients."""
        names = self.sample(server_round)
        task = Task(
            round=server_round,
            params=self.state.params,
            learning_rate=cosine_learning_rate(
                self.config.training, server_round, self.config.federation.num_rounds
            ),
            config=self.config,
            correction=self.local_correction(),
            control=self.state.control,
            reference=self.state.reference,
            run=self.state.run,
            alone=self.clients_alone,
            oldest_checkpoint=self._oldest_checkpoint(),
        )
        self._report = RoundReport(
            server_round, names, bytes_down=self.message_bytes(down=True) * len(names)
        )
        return self._messages(task, MessageType.TRAIN, names)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add valid replies as they arrive, then take the server step.

        Raises:
            FederationError: fewer than ``federation.min_replies`` replies can be used, or the
                server step leaves the finite numbers.
        """
        aggregator = Aggregator(
            reference=self.state.params,
            sizes={name: client.info.num_examples for name, client in self.roster.items()},
            weight_of=self._weight,
            control_change=None if self.state.control is None else self._control_change,
        )
        for reply in replies:
            self._take(reply, aggregator)
        self._note_missing(self._report.sampled, self._report.metrics, self._report.failures)
        needed = min_replies(self.config, len(self.roster))
        self._report.require(needed, self.hooks.on_failed_round)
        self.state = self._next_state(server_round, aggregator)
        loss = self._report.loss
        arrays, _ = pack_params(self.state.params, "float32")
        return arrays, MetricRecord({} if loss is None else {"loss": loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages that ask every client to score the new adapter on its own records."""
        if not self.config.evaluation.clients:
            return []
        state = self.state
        task = Task(server_round, state.params, 0.0, self.config, reference=state.reference)
        return self._messages(task, MessageType.EVALUATE, list(self.roster))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The clients' scores go into the round's report; returns their mean loss."""
        report = self._report
        for reply in replies:
            if (name := self._sender(reply)) is None:
                continue
            try:
                report.scores[name], report.num_scored[name] = read_scores(reply)
            except FederationError as error:
                report.score_failures[name] = str(error)
        self._note_missing(list(self.roster), report.scores, report.score_failures)
        return None if report.score is None else MetricRecord({"loss": report.score})

    def summary(self) -> None:
        """Nothing: the plan is shown before the run starts."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left, ``state.round + 1`` to `num_rounds`.

        Args:
            grid: Flower's way to the clients.
            initial_arrays: returned if no round is left; training starts from ``state.params``.
            num_rounds: last round of the run.
            timeout: seconds to wait for replies; None: ``federation.round_timeout_s``.
            train_config, evaluate_config: unused; tasks carry the configuration.
            evaluate_fn: called after each round; here ``on_round`` evaluates.
        """
        result, inbox = Result(arrays=initial_arrays), open_inbox(grid)
        census = Census(grid, self.config, self.roster, closed=True, inbox=inbox)
        timeout_s = self.config.federation.round_timeout_s if timeout is None else timeout
        for current in range(self.state.round + 1, num_rounds + 1):
            if self.hooks.has_converged():
                break
            started = time.monotonic()
            self.roster = census.settled()
            messages = self.configure_train(current, result.arrays, ConfigRecord(), grid)
            self.hooks.on_start_round(current, self._report.sampled)
            replies = self._exchange(grid, inbox, messages, timeout_s, self._expected())
            new, metrics = self.aggregate_train(current, replies)
            result.arrays = new or result.arrays
            self._report.ignored += census.take_notes()
            result.train_metrics_clientapp[current] = metrics or MetricRecord()
            self._report.seconds = time.monotonic() - started
            if asked := list(self.configure_evaluate(current, result.arrays, ConfigRecord(), grid)):
                replies = self._exchange(grid, inbox, asked, timeout_s, NO_TENSORS)
                local = self.aggregate_evaluate(current, replies)
                result.evaluate_metrics_clientapp[current] = local or MetricRecord()
            self.hooks.on_round(self.state, self._report)
            if evaluate_fn and (scores := evaluate_fn(current, result.arrays)):
                result.evaluate_metrics_serverapp[current] = scores
        return result

    def _prepared(self, state: ServerState) -> ServerState:
        """The state with an entry for every client, and SCAFFOLD's c (float64) as their mean.

        A client that is new when a run goes on has c_i = 0; one that is away keeps its share.
        """
        known = sorted({*state.clients, *self.roster})
        clients = {name: state.clients.get(name, Acknowledged()) for name in known}
        control = state.control
        if self.local_correction().control_variates:
            self._control_copies.require(clients)
            if control is None:
                control = full_like(state.params, 0.0)
            elif state.clients and len(clients) > len(state.clients):
                share = len(state.clients) / len(clients)
                control = {name: value * share for name, value in control.items()}
        return replace(state, clients=clients, control=control)

    def _oldest_checkpoint(self) -> int:
        oldest = self.hooks.oldest_checkpoint()
        return self.state.round if oldest is None else oldest

    def _messages(self, task: Task, message_type: str, names: list[str]) -> list[Message]:
        ttl = time_to_live(self.config.federation.round_timeout_s)
        contents = pack_tasks(task, (self.state.clients[name] for name in names))
        return [
            Message(content, self.roster[name].node_id, message_type, ttl=ttl)
            for name, content in zip(names, contents, strict=True)
        ]

    def _exchange(
        self,
        grid: Grid,
        inbox: Inbox,
        messages: Iterable[Message],
        timeout_s: float,
        expected: Expected,
    ) -> Iterator[Message]:
        node_ids = send(grid, messages)
        self._asked = Asked(node_ids, self.roster)
        return receive(inbox, node_ids, timeout_s, expected)

    def _expected(self) -> Expected:
        """The tensors of an update."""
        params = self.state.params
        with_control = self.local_correction().control_variates
        return Expected.like(delta=params, **({"control_delta": params} if with_control else {}))

    def message_bytes(self, down: bool = False) -> int:
        """Bytes of tensors from one client in a round, or `down` to it."""
        state = self.state
        copies = 1 + (state.control is not None) + (down and state.reference is not None)
        return copies * wire_bytes(state.params, self.config.communication.dtype)

    def _weight(self, name: str, update: Update) -> float:
        """Weight of a client's update in the mean of its round."""
        return {
            "examples": float(self.roster[name].info.num_examples),
            "used": float(update.num_examples),
            "uniform": 1.0,
        }[self.weighting]

    def _control_change(self, name: str, update: Update) -> Params:
        """c_i+ - c_i of an update, c_i being what the server has accepted of the client."""
        acknowledged, oldest = self.state.clients[name].round, self._oldest_checkpoint()
        return self._control_copies.accept(name, update, self._report.round, acknowledged, oldest)

    def _sender(self, reply: Message) -> str | None:
        """Name of the client of a reply; None, and a note, if it counts for no client."""
        try:
            return self._asked.client_of(reply)
        except FederationError as error:
            self._report.ignored.append(str(error))
            return None

    def _take(self, reply: Message, aggregator: Aggregator) -> None:
        report = self._report
        if (name := self._sender(reply)) is None:
            return
        try:
            update = read_update(reply)
            aggregator.add(name, update)
        except FederationError as error:
            report.failures[name] = str(error)
            if isinstance(error, NotFiniteError):
                report.diverged.add(name)
            self.hooks.on_reply(report.round, name, None)
            return
        report.metrics[name] = update.metrics
        report.num_examples[name] = update.num_examples
        report.bytes_up += self.message_bytes()
        before = self.state.clients[name]
        if update.lost and before.round:
            report.lost[name] = before.round
        if self.clients_alone:
            self.hooks.on_update(report.round, name, update.delta, before.round)
        self.hooks.on_reply(report.round, name, update.metrics["loss"])

    def _note_missing(
        self, names: list[str], answered: Mapping[str, object], failures: dict[str, str]
    ) -> None:
        for name in names:
            if name not in self._asked.names:
                failures[name] = "not connected"
            elif name not in answered and name not in failures:
                failures[name] = f"no reply within {self.config.federation.round_timeout_s:g} s"

    def _next_state(self, server_round: int, aggregator: Aggregator) -> ServerState:
        state = self.state
        params, moments = self.server_step(state.params, aggregator.delta.mean(), state.moments)
        params = {name: value.astype(np.float32) for name, value in params.items()}
        try:
            check_like(params, state.params)
        except FederationError as error:
            raise FederationError(
                f"round {server_round}: the server step failed, {error}; lower algorithm.eta="
                f"{self.algorithm.eta:g} or training.learning_rate."
            ) from error
        control = state.control
        if control is not None:
            change = aggregator.control_delta.sum_over(len(state.clients))
            control = self.control_step(control, change)
        accepted = {
            name: Acknowledged(server_round, state.clients[name].updates + 1)
            for name in self._report.metrics
        }
        return replace(
            state,
            round=server_round,
            params=params,
            moments=moments,
            control=control,
            clients=state.clients | accepted,
        )
