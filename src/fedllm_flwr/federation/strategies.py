"""The algorithms as Flower strategies, for this package's server and for any other ServerApp.

Each strategy is a thin wrapper: `federation.rounds` executes a rule of `federation.algorithms`. The
clients run this package's ClientApp::

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Scaffold(["model=smollm2_135m", "data=fingpt"], eta=1.0)
        result = strategy.start(grid, strategy.initial_arrays(), num_rounds=20)
"""

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flwr.app import Array as WireArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.parsing import from_dict
from fedllm_flwr.config.schema import DEFAULT_NUM_CLIENTS, AlgorithmConfig
from fedllm_flwr.errors import ConfigError, FederationError
from fedllm_flwr.federation.census import discover
from fedllm_flwr.federation.channel import Reply, RequestKind
from fedllm_flwr.federation.flower_channel import FlowerChannel
from fedllm_flwr.federation.messages import Assignment
from fedllm_flwr.federation.recorder import Recorder, RoundReport
from fedllm_flwr.federation.replies import Asked
from fedllm_flwr.federation.roster import Roster
from fedllm_flwr.federation.rounds import OpenRound, Rounds, note_scores
from fedllm_flwr.federation.rule import Rule, find_rule
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Params, check_like
from fedllm_flwr.plugins import ALGORITHMS


class FederatedStrategy(Strategy):
    """A Flower strategy that executes the rule of ``algorithm.name``.

    Args:
        config: the run's configuration, or overrides of the default one
            (``["model=smollm2_135m", "training.max_steps=20"]``).
        roster: the participating clients, by name; None: all that `start` finds.
        state: state to resume from, after ``state.round`` completed rounds. None: a new run from
            the arrays given to `start`.
        recorder: is notified of rounds and replies.
        copies: directory for the server's copies of client memory (SCAFFOLD), which is required to
            resume a run later; None: a temporary directory.
        hyper: hyper-parameters of the algorithm by the names of its rule (``eta=0.5``), which
            override those of the configuration.

    Raises:
        ConfigError: an override or a hyper-parameter does not exist, or the configuration selects
            another algorithm.
        FederationError: there are too few clients, they announce too many examples, or the server
            has lost its copy of a client's memory in a resumed run.
    """

    name: ClassVar[str] = ""
    """The algorithm of a subclass; if it is not set, that of the configuration."""

    def __init__(
        self,
        config: Config | Sequence[str] = (),
        roster: Roster | None = None,
        state: ServerState | None = None,
        recorder: Recorder | None = None,
        copies: Path | None = None,
        **hyper: float | str,
    ) -> None:
        self.config = self._configured(config, hyper)
        self.roster = roster
        self.recorder = recorder or Recorder()
        if copies is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="fedllm-copies-")
            copies = Path(self._temporary.name)
        self._copies = copies
        self._rounds = Rounds(self.rule, self.config, self.recorder, copies)
        self._state = state
        if state is not None and roster is not None:
            self._state = self._rounds.begin(state, roster)
        self._channel: FlowerChannel | None = None
        self._opened: OpenRound | None = None
        self._sent: list[Message] = []

    @property
    def rule(self) -> Rule:
        """The algorithm's rule, with its hyper-parameters."""
        return find_rule(self.config.algorithm)

    @property
    def state(self) -> ServerState:
        """The state after the last round.

        Raises:
            FederationError: no run has started.
        """
        if self._state is None:
            raise FederationError("the strategy has no state before `start`")
        return self._state

    def initial_arrays(self) -> ArrayRecord:
        """A fresh adapter for the configured base model, which is loaded for it.

        Raises:
            ModelError, ConfigError: the model cannot be loaded or adapted as asked.
        """
        from fedllm_flwr.models.adapted_model import load_model

        return _arrays(load_model(self.config).initial)

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
        """Run the remaining rounds, ``state.round + 1`` to `num_rounds`.

        Args:
            grid: Flower's connection to the clients.
            initial_arrays: the adapter to start from, float32 by PEFT name. May be empty if the
                strategy already has a state, from which it then resumes.
            num_rounds: last round of the run; the learning-rate schedule spans all rounds.
            timeout: seconds to wait for replies; None: ``federation.round_timeout_s``.
            train_config: overrides of keys of the section ``training``.
            evaluate_config: overrides of keys of the section ``evaluation``.
            evaluate_fn: called with the global adapter before the first round and after each round;
                its results are in the result.

        Raises:
            ConfigError: a key of `train_config` or `evaluate_config` does not exist.
            FederationError: there are too few clients, or a round cannot be completed.
        """
        self.config = _with_sections(
            changed(self.config, federation={"num_rounds": num_rounds}),
            training=train_config or {},
            evaluation=evaluate_config or {},
        )
        if self.roster is None:
            federation = self.config.federation
            wanted = federation.num_clients or federation.min_clients or DEFAULT_NUM_CLIENTS
            self.roster = dict(sorted(discover(grid, self.config, wanted).clients.items()))
        told = _Told(self, evaluate_fn)
        self._rounds = Rounds(self.rule, self.config, told, self._copies)
        self._take_initial(initial_arrays)
        self._state = self._rounds.begin(self.state, self.roster)
        if not self.state.round:
            told.evaluate(self.state)
        self._channel = FlowerChannel(grid, self.config, self.roster)
        timeout_s = self.config.federation.round_timeout_s if timeout is None else timeout
        self._rounds.run(self.state, self._channel, num_rounds, timeout_s)
        told.result.arrays = _arrays(self.state.adapter)
        return told.result

    # The steps of Flower's `Strategy` interface, for callers with their own loop.

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages with this round's assignments to the sampled clients.

        Args:
            arrays: the global adapter, which must be that of the strategy's state.
            config: overrides of keys of the section ``training``.

        Raises:
            FederationError: the strategy was made without a roster.
        """
        self.config = _with_sections(self.config, training=config)
        self._rounds = Rounds(self.rule, self.config, self.recorder, self._copies)
        if self._state is None:
            self._take_initial(arrays)
            channel = self._open_channel(grid)
            self._state = self._rounds.begin(self.state, channel.roster)
        channel = self._open_channel(grid)
        self._opened = self._rounds.open(self.state, channel.roster, server_round)
        return self._messages(channel, RequestKind.TRAIN, self._opened.assignments)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine the usable replies, then take the server step.

        Raises:
            FederationError: fewer than ``federation.min_replies`` replies are usable, or the server
                step gives values that are not finite.
        """
        opened, channel = self._opened, self._channel
        if opened is None or channel is None or opened.report.round != server_round:
            raise FederationError(f"round {server_round} was not opened by `configure_train`")
        read = self._read(channel, RequestKind.TRAIN, replies, opened.assignments)
        self._state = self._rounds.close(opened, read, channel)
        return _arrays(self.state.params), _metrics(opened.report.loss)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages that ask every client to score the new adapter, if ``evaluation.clients``.

        Args:
            config: overrides of keys of the section ``evaluation``.
        """
        self.config = _with_sections(self.config, evaluation=config)
        if not self.config.evaluation.clients:
            return []
        channel = self._open_channel(grid)
        questions = self._rounds.questions(self.state, channel.roster)
        return self._messages(channel, RequestKind.EVALUATE, questions)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The clients' mean loss on their own records, weighted by their numbers of records."""
        if self._channel is None or not self.config.evaluation.clients:
            return None
        report = RoundReport(server_round, [])
        read = self._read(self._channel, RequestKind.EVALUATE, replies, self._channel.roster)
        note_scores(report, read)
        return _metrics(report.score)

    def summary(self) -> None:
        """Print nothing: `server.planning` shows the plan of a run before it starts."""

    def _take_initial(self, arrays: ArrayRecord) -> None:
        params = _params(arrays)
        if self._state is not None:
            if params:
                check_like(params, self._state.params)
        elif not params:
            raise FederationError("no initial adapter; give `initial_arrays()` of the strategy")
        else:
            self._state = ServerState(0, params)

    def _open_channel(self, grid: Grid) -> FlowerChannel:
        if self._channel is None:
            if self.roster is None:
                raise FederationError("give the strategy a roster, or use `start`, which finds it")
            self._channel = FlowerChannel(grid, self.config, self.roster)
        self._channel.settle()
        return self._channel

    def _messages(
        self, channel: FlowerChannel, request: RequestKind, assignments: Mapping[str, Assignment]
    ) -> list[Message]:
        timeout_s = self.config.federation.round_timeout_s
        self._sent = channel.messages(request, assignments, timeout_s)
        return self._sent

    def _read(
        self,
        channel: FlowerChannel,
        request: RequestKind,
        replies: Iterable[Message],
        names: Collection[str],
    ) -> Iterator[Reply]:
        """Read replies; message ids are known only now, as Flower assigns them when sending."""
        sent = {one.metadata.message_id: one.metadata.dst_node_id for one in self._sent}
        asked = Asked(sent, channel.roster)
        timeout_s = self.config.federation.round_timeout_s
        return channel.read(request, replies, asked, names, timeout_s)

    def _configured(
        self, config: Config | Sequence[str], hyper: Mapping[str, float | str]
    ) -> Config:
        """The configuration of the strategy's algorithm, with its hyper-parameters."""
        if not isinstance(config, Config):
            from fedllm_flwr.config.compose import compose

            own = [f"algorithm={self.name}"] if self.name else []
            config = compose([*own, *config])
        chosen = config.algorithm.name
        if self.name and chosen != self.name:
            raise ConfigError(
                f"{type(self).__name__} carries out algorithm={self.name}, but the configuration "
                f"says algorithm={chosen}."
            )
        settings = {field.name for field in fields(ALGORITHMS.find(chosen))}
        if unknown := sorted(hyper.keys() - settings):
            raise ConfigError(
                f"{unknown[0]}: algorithm={chosen} has no such setting; it takes "
                f"{', '.join(sorted(settings))}."
            )
        keys = {field.name for field in fields(AlgorithmConfig)}
        known: dict[str, Any] = {name: value for name, value in hyper.items() if name in keys}
        options = {name: value for name, value in hyper.items() if name not in keys}
        if options:
            known["options"] = {**config.algorithm.options, **options}
        return _with_sections(config, algorithm=known)


class FedAvg(FederatedStrategy):
    """McMahan et al. 2017; see `federation.algorithms.fedavg`."""

    name = "fedavg"


class FedProx(FederatedStrategy):
    """Li et al. 2020; see `federation.algorithms.fedprox`."""

    name = "fedprox"


class Scaffold(FederatedStrategy):
    """Karimireddy et al. 2020; see `federation.algorithms.scaffold`."""

    name = "scaffold"


class FedAvgM(FederatedStrategy):
    """Hsu et al. 2019; see `federation.algorithms.fedavgm`."""

    name = "fedavgm"


class FedAdagrad(FederatedStrategy):
    """Reddi et al. 2021; see `federation.algorithms.fedadagrad`."""

    name = "fedadagrad"


class FedYogi(FederatedStrategy):
    """Reddi et al. 2021; see `federation.algorithms.fedyogi`."""

    name = "fedyogi"


class FedAdam(FederatedStrategy):
    """Reddi et al. 2021; see `federation.algorithms.fedadam`."""

    name = "fedadam"


class FFA(FederatedStrategy):
    """Sun et al. 2024; see `federation.algorithms.ffa`."""

    name = "ffa"


class RoLoRA(FederatedStrategy):
    """Chen et al. 2025; see `federation.algorithms.rolora`."""

    name = "rolora"


class LoRAFair(FederatedStrategy):
    """Bian et al. 2025; see `federation.algorithms.lora_fair`."""

    name = "lora_fair"


class FedEx(FederatedStrategy):
    """Singhal et al. 2025; see `federation.algorithms.fedex`."""

    name = "fedex"


class FlexLoRA(FederatedStrategy):
    """Bai et al. 2024; see `federation.algorithms.flexlora`."""

    name = "flexlora"


class HetLoRA(FederatedStrategy):
    """Cho et al. 2024; see `federation.algorithms.hetlora`."""

    name = "hetlora"


class FLoRA(FederatedStrategy):
    """Wang et al. 2024; see `federation.algorithms.flora`."""

    name = "flora"


class FedSA(FederatedStrategy):
    """Guo et al. 2025; see `federation.algorithms.fedsa`."""

    name = "fedsa"


class FedSB(FederatedStrategy):
    """Singhal et al. 2025; see `federation.algorithms.fed_sb`."""

    name = "fed_sb"


class Ditto(FederatedStrategy):
    """Li et al. 2021; see `federation.algorithms.ditto`."""

    name = "ditto"


class Local(FederatedStrategy):
    """Every client trains its own adapter; see `federation.algorithms.baselines`."""

    name = "local"


class Centralized(FederatedStrategy):
    """One client holds all the data; see `federation.algorithms.baselines`."""

    name = "centralized"


STRATEGIES: dict[str, type[FederatedStrategy]] = {
    kind.name: kind
    for kind in (
        *(FedAvg, FedProx, Scaffold, FedAvgM, FedAdagrad, FedYogi, FedAdam),
        *(FFA, RoLoRA, LoRAFair, FedEx, FlexLoRA, HetLoRA, FLoRA, FedSA, FedSB, Ditto),
        *(Local, Centralized),
    )
}


def strategy_of(config: Config) -> type[FederatedStrategy]:
    """The strategy of a configuration's algorithm, which may come from another package."""
    return STRATEGIES.get(config.algorithm.name, FederatedStrategy)


class _Told(Recorder):
    """Keeps a strategy's state and Flower's result up to date; notifies the user's recorder."""

    def __init__(
        self,
        strategy: FederatedStrategy,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> None:
        self.result = Result()
        self._strategy = strategy
        self._evaluate_fn = evaluate_fn
        self._recorder = strategy.recorder

    def on_start_round(self, round: int, names: list[str]) -> None:
        """Pass it on."""
        self._recorder.on_start_round(round, names)

    def on_reply(self, round: int, name: str, loss: float | None) -> None:
        """Pass it on."""
        self._recorder.on_reply(round, name, loss)

    def on_update(self, round: int, name: str, delta: Params, acknowledged: int) -> None:
        """Pass it on."""
        self._recorder.on_update(round, name, delta, acknowledged)

    def on_failed_round(self, report: RoundReport) -> None:
        """Pass it on."""
        self._recorder.on_failed_round(report)

    def oldest_checkpoint(self) -> int | None:
        """As the user's recorder says."""
        return self._recorder.oldest_checkpoint()

    def has_converged(self) -> bool:
        """As the user's recorder says."""
        return self._recorder.has_converged()

    def on_round(self, state: ServerState, report: RoundReport) -> None:
        """Store the round's state and metrics."""
        self._strategy._state = state
        if (trained := _metrics(report.loss)) is not None:
            self.result.train_metrics_clientapp[report.round] = trained
        if (scored := _metrics(report.score)) is not None:
            self.result.evaluate_metrics_clientapp[report.round] = scored
        self._recorder.on_round(state, report)
        self.evaluate(state)

    def evaluate(self, state: ServerState) -> None:
        """Let the user's function score the global adapter."""
        if self._evaluate_fn is None:
            return
        if (scores := self._evaluate_fn(state.round, _arrays(state.adapter))) is not None:
            self.result.evaluate_metrics_serverapp[state.round] = scores


def _with_sections(config: Config, **sections: Mapping[str, Any]) -> Config:
    """`config` with overrides in its sections.

    Raises:
        ConfigError: a key does not exist, or its value is invalid.
    """
    if not any(sections.values()):
        return config
    values = asdict(config)
    for name, changes in sections.items():
        values[name] |= dict(changes)
    return from_dict(values)


def _arrays(params: Params) -> ArrayRecord:
    return ArrayRecord({name: WireArray(values) for name, values in params.items()})


def _params(arrays: ArrayRecord) -> Params:
    params = {name: array.numpy() for name, array in arrays.items()}
    for name, values in params.items():
        if values.dtype != np.float32:
            raise FederationError(f"'{name}' of the initial adapter is {values.dtype}, not float32")
    return params


def _metrics(loss: float | None) -> MetricRecord | None:
    return None if loss is None else MetricRecord({"loss": loss})
