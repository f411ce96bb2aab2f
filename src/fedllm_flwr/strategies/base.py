"""The mechanics of a round, once: sampling, sending, streaming aggregation, state, evaluation."""

import random
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedllm_flwr.checkpoint import ServerState
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import AlgorithmConfig
from fedllm_flwr.errors import FederationError
from fedllm_flwr.messages import LocalCorrection, Task, Update
from fedllm_flwr.params import Params, add, derive_seed, zeros_like
from fedllm_flwr.schedule import cosine_learning_rate, num_sampled
from fedllm_flwr.strategies.aggregation import Aggregator, RoundReport
from fedllm_flwr.strategies.exchange import Roster, exchange, failure_reason
from fedllm_flwr.wire import pack_params, pack_task, unpack_update, wire_bytes

Moments = dict[str, Params]


@dataclass
class Hooks:
    """What the server does around a round; every hook may be left out."""

    on_reply: Callable[[int, str, float | None], None] = lambda *_: None
    on_round: Callable[[ServerState, RoundReport], None] = lambda *_: None


class FederatedStrategy(Strategy):
    """A Flower strategy whose subclasses state a server step and a local correction.

    Args:
        config: the run's configuration.
        roster: the clients that take part, by name.
        state: where to go on from; ``state.round`` rounds are done already.
        hooks: called after each reply and each round.
    """

    default_weighting: ClassVar[str] = "examples"

    def __init__(
        self, config: Config, roster: Roster, state: ServerState, hooks: Hooks | None = None
    ) -> None:
        self.config = config
        self.roster = roster
        self.hooks = hooks or Hooks()
        self.state = self._prepared(state)
        self._report = RoundReport(state.round, [])

    # What an algorithm states.

    @abstractmethod
    def server_step(
        self, params: Params, delta: Params, moments: Moments
    ) -> tuple[Params, Moments]:
        """New adapter and optimizer moments from the mean update D = `delta` (float64)."""

    def local_correction(self) -> LocalCorrection:
        """Terms that clients add to their gradient; the proximal one is open to all algorithms."""
        return LocalCorrection(mu=self.algorithm.mu)

    # What all algorithms share.

    @property
    def algorithm(self) -> AlgorithmConfig:
        """The algorithm's hyper-parameters."""
        return self.config.algorithm

    @property
    def weighting(self) -> str:
        """``examples`` or ``uniform``."""
        chosen = self.algorithm.weighting
        return self.default_weighting if chosen == "auto" else chosen

    def sample(self, server_round: int) -> list[str]:
        """Names of the clients of a round: the same for the same seed and names."""
        seed = derive_seed(self.config.seed, "sampling", server_round)
        wanted = num_sampled(self.config.federation, len(self.roster))
        return sorted(random.Random(seed).sample(sorted(self.roster), wanted))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages with this round's task to the sampled clients."""
        names = self.sample(server_round)
        federation = self.config.federation
        task = Task(
            round=server_round,
            params=self.state.params,
            learning_rate=cosine_learning_rate(
                self.config.training, server_round, federation.num_rounds
            ),
            config=self.config,
            correction=self.local_correction(),
            control=self.state.control,
        )
        content = pack_task(task)
        down = wire_bytes(self.state.params, self.config.communication.dtype)
        copies = 1 if self.state.control is None else 2
        self._report = RoundReport(server_round, names, bytes_down=down * copies * len(names))
        return [
            Message(
                content=content,
                dst_node_id=self.roster[name].node_id,
                message_type=MessageType.TRAIN,
                ttl=federation.round_timeout_s,
            )
            for name in names
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add valid replies as they arrive, then take the server step.

        Raises:
            FederationError: fewer than ``federation.min_replies`` replies can be used.
        """
        aggregator = Aggregator(
            reference=self.state.params,
            sizes={name: client.info.num_examples for name, client in self.roster.items()},
            weight_of=self._weight,
            with_control=self.local_correction().control_variates,
        )
        for reply in replies:
            self._take(reply, aggregator)
        self._note_missing()
        self._require_replies()
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
        task = Task(server_round, self.state.params, 0.0, self.config)
        content = pack_task(task)
        return [
            Message(content=content, dst_node_id=client.node_id, message_type=MessageType.EVALUATE)
            for client in self.roster.values()
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Mean of the clients' losses, weighted by their numbers of examples."""
        total, count = 0.0, 0
        for reply in replies:
            if failure_reason(reply) is None:
                metrics = reply.content.metric_records["metrics"]
                size = int(metrics["num_examples"])  # type: ignore[arg-type]
                total += float(metrics["loss"]) * size  # type: ignore[arg-type]
                count += size
        return MetricRecord({"loss": total / count}) if count else None

    def summary(self) -> None:
        """Nothing: the plan is shown before the run starts."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left, ``state.round + 1`` to `num_rounds`."""
        result = Result()
        empty = ConfigRecord()
        arrays = result.arrays = initial_arrays
        for current in range(self.state.round + 1, num_rounds + 1):
            started = time.monotonic()
            replies = exchange(grid, self.configure_train(current, arrays, empty, grid), timeout)
            new_arrays, metrics = self.aggregate_train(current, replies)
            arrays = result.arrays = new_arrays or arrays
            result.train_metrics_clientapp[current] = metrics or MetricRecord()
            self._report.seconds = time.monotonic() - started
            self.hooks.on_round(self.state, self._report)
            questions = list(self.configure_evaluate(current, arrays, empty, grid))
            answers: Iterator[Message] = exchange(grid, questions, timeout)
            if local := self.aggregate_evaluate(current, answers):
                result.evaluate_metrics_clientapp[current] = local
            if evaluate_fn and (scores := evaluate_fn(current, arrays)):
                result.evaluate_metrics_serverapp[current] = scores
        return result

    def _prepared(self, state: ServerState) -> ServerState:
        """Give SCAFFOLD its zero control variate at the start of a run."""
        if self.local_correction().control_variates and state.control is None:
            return replace(state, control=zeros_like(state.params))
        return state

    def _weight(self, name: str, update: Update) -> float:
        if self.weighting == "uniform":
            return 1.0
        if self.algorithm.variant == "openfedllm":
            return float(self.roster[name].info.num_examples)
        return float(update.num_examples)

    def _take(self, reply: Message, aggregator: Aggregator) -> None:
        report, dtype = self._report, self.config.communication.dtype
        name = self._name_of(reply)
        reason = failure_reason(reply)
        if reason is None:
            try:
                update = unpack_update(reply.content)
                aggregator.add(name, update)
            except FederationError as error:
                reason = f"update refused: {error}"
        if reason is not None:
            report.failures[name] = reason
            self.hooks.on_reply(report.round, name, None)
            return
        report.metrics[name] = update.metrics
        report.num_examples[name] = update.num_examples
        copies = 1 if update.control_delta is None else 2
        report.bytes_up += wire_bytes(update.delta, dtype) * copies
        self.hooks.on_reply(report.round, name, update.metrics["loss"])

    def _name_of(self, reply: Message) -> str:
        """Client of a reply; the SuperLink answers in its own name for a node that was lost."""
        names = {client.node_id: name for name, client in self.roster.items()}
        return names.get(reply.metadata.src_node_id, f"node {reply.metadata.src_node_id}")

    def _note_missing(self) -> None:
        report, timeout_s = self._report, self.config.federation.round_timeout_s
        for name in report.sampled:
            if name not in report.metrics and name not in report.failures:
                report.failures[name] = f"no reply within {timeout_s:.0f} s"

    def _require_replies(self) -> None:
        report, wanted = self._report, self.config.federation.min_replies
        if len(report.metrics) >= wanted:
            return
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(report.failures.items()))
        raise FederationError(
            f"round {report.round}: {len(report.metrics)} of {len(report.sampled)} replies could be "
            f"used, federation.min_replies={wanted}. {reasons}"
        )

    def _next_state(self, server_round: int, aggregator: Aggregator) -> ServerState:
        state = self.state
        params, moments = self.server_step(state.params, aggregator.delta.mean(), state.moments)
        control = state.control
        if control is not None:
            control = add(control, aggregator.control_delta.sum_over(len(self.roster)))
        cast_params = {name: value.astype(np.float32) for name, value in params.items()}
        return ServerState(server_round, cast_params, moments, control)
