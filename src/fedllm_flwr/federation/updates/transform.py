"""The chain of transforms between a client's update and the sum, each with both its ends.

A transform is one class in one file: `client_end` runs where the update is made, `server_end` where
it arrives. A configuration chooses transforms by name (``communication.transforms``), and installed
packages add names; their order follows from their stages, not from the order of the names. With
``privacy.unit=client`` the clip is one of them. The last link is always the cast to
``communication.dtype`` (`updates.cast`).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
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
    """Which update passes: of which client and round, and the run's seed for draws."""

    client: str
    round: int
    seed: int


class UpdateTransform(ABC):
    """One link of the chain. Its constructor takes the run's configuration."""

    stage: ClassVar[Stage]

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def client_end(self, groups: Groups, passage: Passage) -> Groups:
        """What leaves the client in the place of `groups`: ``delta`` and what the rule adds.

        Tensors are float32 or float64 by name. Names and shapes may differ from the adapter's if
        `expected` says so.
        """

    def server_end(self, groups: Groups, passage: Passage) -> Groups:
        """What the server goes on with; has to undo whatever changes names or shapes.

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

    def client_end(self, groups: Groups, passage: Passage) -> Groups:
        """`groups` as they leave the client, but for the cast, which the wire does."""
        for link in self.links:
            groups = link.client_end(groups, passage)
        return groups

    def server_end(self, groups: Groups, passage: Passage) -> Groups:
        """`groups` as the server goes on with them."""
        for link in reversed(self.links):
            groups = link.server_end(groups, passage)
        return groups

    def arriving(self, sent: Groups, passage: Passage) -> Groups:
        """What the server goes on with when `sent`, the client's end, has left."""
        return self.server_end(
            {group: self.as_received(params) for group, params in sent.items()}, passage
        )

    def expected(self, groups: Groups) -> Groups:
        """Names and shapes that travel for an update like `groups`."""
        for link in self.links:
            groups = link.expected(groups)
        return groups

    def as_received(self, params: Params) -> Params:
        """Tensors as the server will read them: cast to the dtype of the wire and back."""
        return round_trip(params, self.dtype)
