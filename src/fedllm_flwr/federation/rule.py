"""A rule: what makes one federated algorithm differ from another, as pure functions.

A rule says what the server sends beside the global adapter, which terms clients add to their
objective, what they contribute beside their update and keep for the next round, how contributions
are weighted and combined, and the server step. It knows nothing of Flower, messages, disks or
engines: the rounds (`federation.rounds`), the clients (`client.local_round`) and the Flower
strategies (`federation.strategies`) carry it out.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

from fedllm_flwr.config.schema import AlgorithmConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.factors import is_a, is_b
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Groups, Params
from fedllm_flwr.plugins import ALGORITHMS
from fedllm_flwr.training.local_terms import LocalResult, LocalTerms

Weighting = Literal["examples", "used", "uniform"]
Factors = Literal["both", "b", "alternate"]


@dataclass(frozen=True)
class Counts:
    """What stands behind the combined contributions of a round.

    Args:
        replied: clients whose contributions were accepted.
        clients: N, all clients of the run, sampled or not.
        weight: sum of the weights of the accepted contributions.
        adapters: w_i = w + D_i of the clients that replied, in the order of their names; only for a
            rule that `Rule.stacks`.
        shares: p_i, their weights, which sum to 1.
        names: of these clients.
    """

    replied: int
    clients: int
    weight: float
    adapters: Sequence[Params] = ()
    shares: Sequence[float] = ()
    names: Sequence[str] = ()


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
        factors: which matrices of the adapter are trained and travel back: ``both``; ``b``, with A
            at its seeded start; ``alternate``, B in odd rounds and A in even ones.
    """

    variant: Literal["paper", "openfedllm"] = "paper"
    mu: float = 0.0
    factors: Factors = "both"

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
    personal: ClassVar[str | None] = None
    """Kind of client memory that makes a client's own adapter, where it has one that it uses and
    scores beside the global one."""
    aggregates: ClassVar[bool] = True
    """Whether there is a global adapter; without, each client keeps its own."""
    takes_factors: ClassVar[frozenset[str]] = frozenset({"both"})
    """Values of `factors` with which the algorithm is sound."""
    stacks: ClassVar[bool] = False
    """Whether `step` needs the clients' adapters one by one (`Counts.adapters`)."""
    any_rank: ClassVar[bool] = False
    """Whether clients may have adapters of different ranks. There is no ``delta`` for all then."""
    freezes: ClassVar[bool] = False
    """Whether `step` keeps factors that clients have beside the adapter and do not train, as
    ``state.tensors["frozen"]``."""

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
        if algorithm.variant not in cls.weighting:
            raise ConfigError(
                f"algorithm.variant={algorithm.variant}: algorithm={algorithm.name} has none; drop "
                "it, or use algorithm.variant=paper."
            )
        rule = cls(**{**known, **options})
        if rule.factors not in cls.takes_factors:
            raise ConfigError(
                f"algorithm.factors={rule.factors} does not go with algorithm={algorithm.name}, "
                f"which takes {' or '.join(sorted(cls.takes_factors))}."
            )
        return rule

    @property
    def as_openfedllm(self) -> bool:
        """Whether to reproduce OpenFedLLM's own update rather than the paper's."""
        return self.variant == "openfedllm"

    # Both ends

    def trains(self, name: str, round: int) -> bool:
        """Whether clients train a tensor in a round."""
        if self.factors == "both":
            return True
        return is_b(name) if self.factors == "b" or round % 2 else is_a(name)

    def shares(self, name: str, round: int) -> bool:
        """Whether the change of a tensor travels back in a round."""
        return self.trains(name, round)

    def is_fixed(self, name: str) -> bool:
        """Whether a tensor of the global adapter never leaves its start.

        Where that is drawn from the run's seed, clients draw it themselves.
        """
        return self.factors == "b" and is_a(name)

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

    def rank(self, state: ServerState, client: str, rank: int) -> int:
        """The rank of a client's adapter in the next round, at most `rank`, what it may have."""
        return rank

    @abstractmethod
    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """The state with the new adapter and the rule's tensors.

        Args:
            combined: ``delta``, as the combiner gives it, with the tensors that `shares` names;
                and for each of `contributes` the sum over the clients that replied, divided by N;
                float64.
        """

    # The clients' end

    def local_terms(self, received: Groups, memory: Groups) -> LocalTerms:
        """Where local training starts and what is added to the client's objective.

        Args:
            received: the global adapter ``params`` and what `send` gave.
            memory: what the client remembers, by kind, as of the acknowledged round.
        """
        return LocalTerms(received["params"], self.mu, as_openfedllm=self.as_openfedllm)

    def personal_terms(self, received: Groups, memory: Groups) -> LocalTerms | None:
        """Local training of the client's own adapter after that of the global one; None: none.

        What it leads to is kept as the kind of memory `personal`.
        """
        return None

    def personal_adapter(self, received: Groups, memory: Groups) -> Params | None:
        """The client's own adapter, as of the acknowledged round; None before it has one."""
        return None if self.personal is None else memory.get(self.personal)

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
