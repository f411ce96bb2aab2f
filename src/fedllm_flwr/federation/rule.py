"""A rule: what makes one federated algorithm differ from another, as pure functions.

A rule says what the server sends beside the global adapter, which terms clients add to their
objective, what they contribute beside their update and keep for the next round, how contributions
are weighted and combined, and the server step. It knows nothing of Flower, messages, disks or
engines: the rounds (`federation.rounds`), the clients (`client.local_round`) and the Flower
strategies (`federation.strategies`) carry it out.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

from fedllm_flwr.config.schema import AlgorithmConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Groups, Params
from fedllm_flwr.plugins import ALGORITHMS
from fedllm_flwr.training.local_terms import LocalResult, LocalTerms

Weighting = Literal["examples", "used", "uniform"]


@dataclass(frozen=True)
class Counts:
    """What stands behind the combined contributions of a round.

    Args:
        replied: clients whose contributions were accepted.
        clients: N, all clients of the run, sampled or not.
        weight: sum of the weights of the accepted contributions.
    """

    replied: int
    clients: int
    weight: float


@dataclass(frozen=True)
class Aftermath:
    """What a client does after local training, beside sending its update.

    Args:
        contributions: groups of tensors to send with the update, by name.
        memory: groups of tensors to keep for the next round, by kind.
    """

    contributions: Mapping[str, Params] = field(default_factory=dict)
    memory: Mapping[str, Params] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """A federated algorithm. Subclasses are frozen dataclasses of their hyper-parameters.

    Args:
        variant: ``paper``, or ``openfedllm`` for OpenFedLLM's own update in every detail.
        mu: weight of a proximal term that clients add to their loss; open to every algorithm.
    """

    variant: Literal["paper", "openfedllm"] = "paper"
    mu: float = 0.0

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples", "openfedllm": "examples"}
    """Weights of the updates in their mean, by variant."""
    combiner: ClassVar[str] = "mean"
    """How updates become one: a name in `plugins.COMBINERS`."""
    contributes: ClassVar[Mapping[str, str]] = {}
    """Groups that clients send beside ``delta``, each with the kind of client memory whose change
    it is. The server adds them up over the clients that replied and divides by N. It keeps a copy
    of each client's memory of that kind, so that the share of a client that has lost it can be
    taken out again."""
    sends: ClassVar[frozenset[str]] = frozenset()
    """Groups that clients are sent beside the global adapter; a client refuses others."""
    remembers: ClassVar[frozenset[str]] = frozenset()
    """Kinds of client memory without which a client cannot go on where it was."""
    aggregates: ClassVar[bool] = True
    """Whether there is a global adapter; without, each client keeps its own."""

    @classmethod
    def from_config(cls, algorithm: AlgorithmConfig) -> Self:
        """The rule with the hyper-parameters of a configuration.

        Raises:
            ConfigError: ``algorithm.options`` holds a key that the rule lacks.
        """
        names = {found.name for found in fields(cls)}
        options = dict(algorithm.options)
        if unknown := sorted(options.keys() - names):
            raise ConfigError(
                f"algorithm.options.{unknown[0]}: algorithm={algorithm.name} has no such setting; "
                f"it takes {', '.join(sorted(names))}."
            )
        known = {name: getattr(algorithm, name) for name in names if hasattr(algorithm, name)}
        return cls(**{**known, **options})

    @property
    def as_openfedllm(self) -> bool:
        """Whether to reproduce OpenFedLLM's own update rather than the paper's."""
        return self.variant == "openfedllm"

    # The server's end

    def start(self, state: ServerState, num_clients: int) -> ServerState:
        """`state` made ready for `num_clients`, at the start of a run and when it goes on.

        ``state.clients`` are the clients before. Tensors of the rule go into ``state.tensors``.

        Raises:
            FederationError: the algorithm cannot work with so many clients.
        """
        return state

    def send(self, state: ServerState, client: str) -> Groups:
        """The groups of tensors of `sends` for a client; also ``params``, where it is sent its own.

        Clients that are sent the same tensors should be given the same objects: they are then
        encoded once.
        """
        return {}

    @abstractmethod
    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """The state with the new adapter and the rule's tensors.

        Args:
            combined: ``delta``, as the combiner gives it, and for each of `contributes` the sum
                over the clients that replied, divided by N; float64.
        """

    # The clients' end

    def local_terms(self, received: Groups, memory: Groups) -> LocalTerms:
        """Where local training starts and what is added to the client's objective.

        Args:
            received: the global adapter ``params`` and what `send` gave.
            memory: what the client remembers, by kind, as of the acknowledged round.
        """
        return LocalTerms(received["params"], self.mu, as_openfedllm=self.as_openfedllm)

    def finish(
        self,
        result: LocalResult,
        received: Groups,
        memory: Groups,
        as_received: Callable[[Params], Params],
    ) -> Aftermath:
        """What a client contributes beside its update, and what it keeps.

        Args:
            as_received: how tensors arrive at the server after all update transforms.
        """
        return Aftermath()


def find_rule(algorithm: AlgorithmConfig) -> Rule:
    """The rule that a configuration chooses.

    Raises:
        ConfigError: nothing installed has this name, or a setting does not exist.
    """
    kind: Any = ALGORITHMS.find(algorithm.name)
    rule: Rule = kind.from_config(algorithm)
    return rule
