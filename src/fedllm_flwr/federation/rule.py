"""`Rule`: the interface of a federated algorithm, as pure functions.

A rule defines what the server sends in addition to the global adapter, the terms that clients add
to their objective, what clients send in addition to their update, what they keep for the next
round, how contributions are weighted and combined, and the server step. It does not depend on
Flower, messages, disks or engines. `federation.rounds` runs its server side, `client.local_round`
its client side, and `federation.strategies` wraps it as a Flower strategy.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fedllm_flwr.config.names import shown
from fedllm_flwr.config.schema import AlgorithmConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.factors import is_a, is_b
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Array, Groups, Params
from fedllm_flwr.plugins import ALGORITHMS
from fedllm_flwr.training.local_terms import LocalResult, LocalTerms

Weighting = Literal["examples", "used", "uniform"]
Factors = Literal["both", "b", "alternate"]


@dataclass(frozen=True)
class Counts:
    """Client counts, weights and adapters of a round, as the server step needs them.

    Args:
        replied: number of clients whose contributions were accepted.
        clients: N, the number of clients in the run, sampled or not.
        weight: sum of the weights of the accepted contributions.
        adapters: w_i = w + D_i of the clients that replied, in the order of their names; set only
            if `Rule.stacks`. Tensors are read from a file on access, so work module by module.
        shares: p_i, the normalised weights of these clients, which sum to 1.
        names: names of these clients.
    """

    replied: int
    clients: int
    weight: float
    adapters: Sequence[Mapping[str, Array]] = ()
    shares: Sequence[float] = ()
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Aftermath:
    """What a client sends with its update, and what it keeps for the next round.

    Args:
        contributions: groups of tensors to send with the update, by name.
        memory: groups of tensors to keep, by kind of client memory.
    """

    contributions: Mapping[str, Params] = field(default_factory=dict)
    memory: Mapping[str, Params] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """A federated algorithm. Subclasses are frozen dataclasses of their hyper-parameters.

    Args:
        variant: ``paper``, or ``openfedllm`` to reproduce OpenFedLLM's update exactly.
        mu: weight of a proximal term in the clients' loss; every algorithm accepts it.
        factors: LoRA matrices that clients train and send back: ``both``; ``b``, with A frozen at
            its seeded initial value; ``alternate``, B in odd rounds and A in even ones.
    """

    variant: Literal["paper", "openfedllm"] = "paper"
    mu: float = 0.0
    factors: Factors = "both"

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "examples", "openfedllm": "examples"}
    """How the mean weights the updates, by variant."""
    combiner: ClassVar[str] = "mean"
    """How updates are combined: a name in `plugins.COMBINERS`."""
    contributes: ClassVar[Mapping[str, str]] = {}
    """Groups of tensors that clients send in addition to ``delta``. Each maps to a kind of client
    memory and is the change of that memory in the round. The server sums them over the clients
    that replied and divides by N. It also keeps a copy of each client's memory of that kind, so
    that it can subtract the share of a client that has lost its memory."""
    sends: ClassVar[frozenset[str]] = frozenset()
    """Groups that the server sends in addition to the global adapter; a client refuses others."""
    remembers: ClassVar[frozenset[str]] = frozenset()
    """Kinds of client memory that a client needs in order to continue from its last round."""
    personal: ClassVar[str | None] = None
    """Kind of client memory that holds a client's personal adapter, for algorithms in which
    clients use and score one in addition to the global adapter."""
    aggregates: ClassVar[bool] = True
    """Whether there is a global adapter; otherwise each client keeps its own."""
    takes_factors: ClassVar[frozenset[str]] = frozenset({"both"})
    """Values of `factors` that the algorithm supports."""
    stacks: ClassVar[bool] = False
    """Whether `step` needs the individual client adapters (`Counts.adapters`)."""
    any_rank: ClassVar[bool] = False
    """Whether clients may have adapters of different ranks; `step` then gets no ``delta``."""
    freezes: ClassVar[bool] = False
    """Whether `step` maintains frozen factors, which clients apply with the adapter and do not
    train, as ``state.tensors["frozen"]``."""
    has_cores: ClassVar[bool] = False
    """Whether adapters are products B R A, with a core R (r, r) for each module."""

    @classmethod
    def from_config(cls, algorithm: AlgorithmConfig) -> Self:
        """The rule with the hyper-parameters of a configuration.

        Raises:
            ConfigError: the rule has no such option, variant or value of ``algorithm.factors``.
        """
        names = {found.name for found in fields(cls)}
        known = {name: getattr(algorithm, name) for name in names if hasattr(algorithm, name)}
        options = cls._checked_options(algorithm, names - known.keys())
        if algorithm.variant not in cls.weighting:
            raise ConfigError(
                f"algorithm.variant={algorithm.variant}: algorithm={algorithm.name} has none; drop "
                "it, or use algorithm.variant=paper."
            )
        if cls.stacks and algorithm.eta != 1 and "eta" not in names:
            raise ConfigError(
                f"algorithm.eta={algorithm.eta:g} has no effect with algorithm={algorithm.name}, "
                "whose server step takes no rate; set algorithm.eta=1."
            )
        rule = cls(**{**known, **options})
        if rule.factors not in cls.takes_factors:
            raise ConfigError(
                f"algorithm.factors={rule.factors} does not work with algorithm={algorithm.name}, "
                f"which takes {' or '.join(sorted(cls.takes_factors))}."
            )
        return rule

    @classmethod
    def _checked_options(cls, algorithm: AlgorithmConfig, names: Set[str]) -> dict[str, Any]:
        """``algorithm.options``, whose names are in `names`, with values of the fields' types."""
        types = get_type_hints(cls) if algorithm.options else {}
        for name, value in algorithm.options.items():
            key = f"algorithm.options.{name}"
            if hasattr(algorithm, name):
                raise ConfigError(f"{key}: this is a key of its own, algorithm.{name}; set that.")
            if name not in names:
                takes = f"it takes {', '.join(sorted(names))}" if names else "it takes no options"
                raise ConfigError(
                    f"{key}: algorithm={algorithm.name} has no such setting; {takes}."
                )
            try:
                TypeAdapter(types[name]).validate_python(value, strict=True)
            except ValidationError as error:
                (problem, *_) = error.errors()
                raise ConfigError(f"{key}={shown(value)}: {problem['msg']}.") from None
        return dict(algorithm.options)

    @property
    def as_openfedllm(self) -> bool:
        """Whether to reproduce OpenFedLLM's update instead of the paper's."""
        return self.variant == "openfedllm"

    # Both ends

    def trains(self, name: str, round: int) -> bool:
        """Whether clients train the tensor `name` in a round."""
        if self.factors == "both":
            return True
        return is_b(name) if self.factors == "b" or round % 2 else is_a(name)

    def shares(self, name: str, round: int) -> bool:
        """Whether clients send back the change of the tensor `name` in a round."""
        return self.trains(name, round)

    def estimates(self, round: int) -> bool:
        """Whether clients send the mean gradient at the adapter as received instead of a change."""
        return False

    def is_fixed(self, name: str) -> bool:
        """Whether a tensor of the global adapter keeps its initial value for the whole run.

        If that value is drawn from the run's seed, clients draw it themselves and it is not sent.
        """
        return self.factors == "b" and is_a(name)

    # The server's end

    def start(self, state: ServerState, num_clients: int) -> ServerState:
        """Prepare `state` for `num_clients` clients, at the start of a run and on resume.

        ``state.clients`` holds the clients of the run before it was resumed. The rule keeps its
        own tensors in ``state.tensors``.

        Raises:
            FederationError: the algorithm does not support this number of clients.
        """
        return state

    def send(self, state: ServerState, client: str) -> Groups:
        """The groups of `sends` for one client; ``params`` too, if it gets its own adapter.

        Return the same objects for clients that get the same tensors: they are then encoded once.
        """
        return {}

    def rank(self, state: ServerState, client: str, rank: int) -> int:
        """The rank of a client's adapter in the next round; `rank` is its upper bound."""
        return rank

    @abstractmethod
    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """The server step: the state with the new adapter and the rule's new tensors.

        Args:
            combined: float64 tensors. ``delta`` is the combiner's result, with the tensors that
                `shares` selects; each group of `contributes` is the sum over the clients that
                replied, divided by N.
        """

    # The clients' end

    def local_terms(self, received: Groups, memory: Groups) -> LocalTerms:
        """The adapter that local training starts from, and the terms added to the objective.

        Args:
            received: the global adapter as ``params``, and the groups that `send` returned.
            memory: the client's memory of the acknowledged round, by kind.
        """
        return LocalTerms(received["params"], self.mu, as_openfedllm=self.as_openfedllm)

    def personal_terms(self, received: Groups, memory: Groups) -> LocalTerms | None:
        """How to train the client's personal adapter, after the global one; None: there is none.

        The client keeps the trained adapter as its memory of kind `personal`.
        """
        return None

    def personal_adapter(self, received: Groups, memory: Groups) -> Params | None:
        """The client's personal adapter as of the acknowledged round; None before it has one."""
        return None if self.personal is None else memory.get(self.personal)

    def finish(
        self,
        result: LocalResult,
        received: Groups,
        memory: Groups,
        as_received: Callable[[Params], Params],
    ) -> Aftermath:
        """What a client sends in addition to its update, and what it keeps.

        Args:
            as_received: maps tensors to what the server receives after all update transforms.
        """
        return Aftermath()


def find_rule(algorithm: AlgorithmConfig) -> Rule:
    """The rule that a configuration selects.

    Raises:
        ConfigError: no installed algorithm has this name, or the rule has no such option.
    """
    kind: Any = ALGORITHMS.find(algorithm.name)
    rule: Rule = kind.from_config(algorithm)
    return rule
