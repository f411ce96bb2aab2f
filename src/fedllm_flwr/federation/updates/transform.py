"""The chain of update transforms between a client's update and the server's sum.

A transform is one class in one file: `client_end` runs at the client, and `server_end` reverses it
at the server. A configuration selects transforms by name (``communication.transforms``), and
installed packages can add more; their order is that of their stages, not of the names. With
``privacy.unit=client``, clipping is one of them. The last link is always the cast to
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
    """Context of an update in the chain: client, round, and the run's seed for random draws.

    ``memory`` is the client's memory by kind; it is empty at the server.
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
        """Transform `groups` before they are sent: ``delta`` and the rule's further groups.

        Tensors are float32 or float64. Names, shapes and dtype may differ from the adapter's if
        `expected` says so; uint8 tensors are sent unchanged.
        """

    def remembered(self, before: Groups, after: Groups, passage: Passage) -> Groups:
        """The client memory to keep for the next round, by kind.

        Args:
            before: the input of `client_end`.
            after: the output of `client_end`.
        """
        return {}

    def server_end(self, groups: Groups, like: Groups, passage: Passage) -> Groups:
        """Reverse the transform at the server; must restore names and shapes.

        Args:
            like: tensors with the names and shapes of the result.

        Raises:
            FederationError: `client_end` cannot have produced `groups`. A client can send any
                tensors with the expected names and shapes.
        """
        return groups

    def expected(self, groups: Groups) -> Groups:
        """Names and shapes that the server receives for an update like `groups`."""
        return groups


@dataclass(frozen=True)
class Chain:
    """The transforms of a run, in order."""

    links: tuple[UpdateTransform, ...]
    dtype: str

    @classmethod
    def of(cls, config: Config) -> "Chain":
        """The chain of a configuration.

        Raises:
            ConfigError: a transform is not installed here.
        """
        privacy, names = config.privacy, list(config.communication.transforms)
        if privacy.unit == "client" and privacy.clip_quantile is None and "clip" not in names:
            names.append("clip")  # with a private quantile the server alone knows the bound
        kinds: list[Any] = [TRANSFORMS.find(name) for name in names]
        links = tuple(kind(config) for kind in sorted(kinds, key=lambda kind: kind.stage))
        return cls(links, config.communication.dtype)

    def client_end(self, groups: Groups, passage: Passage) -> tuple[Groups, Groups]:
        """`groups` as sent, before the cast, and the client memory to keep, by kind."""
        kept: dict[str, Params] = {}
        for link in self.links:
            before, groups = groups, link.client_end(groups, passage)
            kept |= link.remembered(before, groups, passage)
        return groups, kept

    def server_end(self, groups: Groups, like: Groups, passage: Passage) -> Groups:
        """`groups` as decoded by the server, with the names and shapes of `like`."""
        shapes = []
        for link in self.links:
            shapes.append(like)
            like = link.expected(like)
        for link, before in zip(reversed(self.links), reversed(shapes), strict=True):
            groups = link.server_end(groups, before, passage)
        return groups

    def expected(self, groups: Groups) -> Groups:
        """Names and shapes that are sent for an update like `groups`."""
        for link in self.links:
            groups = link.expected(groups)
        return groups

    def as_received(self, params: Params) -> Params:
        """Tensors as the server receives them: cast to the wire dtype and back."""
        return round_trip(params, self.dtype)
