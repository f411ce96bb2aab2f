"""The chain of transforms between a client's update and the sum, each with both its ends.

A transform is one class in one file: `client_end` runs where the update is made, `server_end` where
it arrives. A configuration chooses transforms by name (``communication.transforms``), and installed
packages add names; their order follows from their stages, not from the order of the names. With
``privacy.unit=client`` the clip is one of them. The last link is always the cast to
``communication.dtype`` (`updates.cast`).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

from fedllm_flwr.config import Config
from fedllm_flwr.federation.updates.cast import round_trip
from fedllm_flwr.params import Groups, Params
from fedllm_flwr.plugins import TRANSFORMS


class Stage(IntEnum):
    """When a transform acts at the client; the server undoes them in reverse order."""

    CLIP = 1
    NOISE = 2
    COMPRESS = 3
    CAST = 4
    MASK = 5


@dataclass(frozen=True)
class Passage:
    """Which update passes: of which client and round, and the run's seed for draws.

    ``memory`` is what the client remembers by kind; at the server there is none.
    """

    client: str
    round: int
    seed: int
    memory: Groups = field(default_factory=dict)


class UpdateTransform(ABC):
    """One link of the chain. Its constructor takes the run's configuration."""

    stage: ClassVar[Stage]

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def client_end(self, groups: Groups, passage: Passage) -> Groups:
        """What leaves the client in the place of `groups`: ``delta`` and what the rule adds.

        Tensors are float32 or float64 by name. Names, shapes and dtype may differ from the
        adapter's if `expected` says so; uint8 travels as it is.
        """

    def remembered(self, before: Groups, after: Groups, passage: Passage) -> Groups:
        """What the client keeps for its next round, by kind.

        Args:
            before: the groups that were given to `client_end`.
            after: what it made of them.
        """
        return {}

    def server_end(self, groups: Groups, like: Groups, passage: Passage) -> Groups:
        """What the server goes on with; has to undo whatever changes names or shapes.

        Args:
            like: tensors with the names and shapes of the result.

        Raises:
            FederationError: `groups` cannot be what the other end makes. The client can have sent
                any tensors of the expected names and shapes.
        """
        return groups

    def expected(self, groups: Groups) -> Groups:
        """Names and shapes that arrive for an update like `groups`."""
        return groups


@dataclass(frozen=True)
class Chain:
    """The transforms of a run in their order."""

    links: tuple[UpdateTransform, ...]
    dtype: str

    @classmethod
    def of(cls, config: Config) -> "Chain":
        """The chain that a configuration asks for.

        Raises:
            ConfigError: names a transform that is not installed here.
        """
        privacy, names = config.privacy, list(config.communication.transforms)
        if privacy.unit == "client" and privacy.clip_quantile is None and "clip" not in names:
            names.append("clip")  # with a private quantile the server alone knows the bound
        kinds: list[Any] = [TRANSFORMS.find(name) for name in names]
        links = tuple(kind(config) for kind in sorted(kinds, key=lambda kind: kind.stage))
        return cls(links, config.communication.dtype)

    def client_end(self, groups: Groups, passage: Passage) -> tuple[Groups, Groups]:
        """`groups` as they leave the client, but for the cast, and what it keeps, by kind."""
        kept: dict[str, Params] = {}
        for link in self.links:
            before, groups = groups, link.client_end(groups, passage)
            kept |= link.remembered(before, groups, passage)
        return groups, kept

    def server_end(self, groups: Groups, like: Groups, passage: Passage) -> Groups:
        """`groups` as the server goes on with them, with the names and shapes of `like`."""
        shapes = []
        for link in self.links:
            shapes.append(like)
            like = link.expected(like)
        for link, before in zip(reversed(self.links), reversed(shapes), strict=True):
            groups = link.server_end(groups, before, passage)
        return groups

    def expected(self, groups: Groups) -> Groups:
        """Names and shapes that travel for an update like `groups`."""
        for link in self.links:
            groups = link.expected(groups)
        return groups

    def as_received(self, params: Params) -> Params:
        """Tensors as the server will read them: cast to the dtype of the wire and back."""
        return round_trip(params, self.dtype)
