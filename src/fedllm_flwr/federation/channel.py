"""The way to the clients and back, as rounds see it: assignments go out, answers come in."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Assignment, LocalScores, MaskedUpdate, Update
from fedllm_flwr.federation.roster import Roster
from fedllm_flwr.federation.secure.site import Opened, Unmask
from fedllm_flwr.params import Groups

Request = Assignment | Unmask
Answer = Update | MaskedUpdate | LocalScores | Opened


class RequestKind(StrEnum):
    """What clients are asked for; Flower's names of message types."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    UNMASK = "query.unmask"


class NoReplyError(FederationError):
    """Nothing has come from a client."""


@dataclass(frozen=True)
class Reply:
    """A client's answer to a request, or why there is none that can be used."""

    client: str
    answer: Answer | FederationError


class Channel(Protocol):
    """A way to the clients of a run."""

    @property
    def roster(self) -> Roster:
        """The clients, as they were when `settle` was called last."""

    def settle(self) -> None:
        """Find clients that have come back under another address."""

    def exchange(
        self,
        request: RequestKind,
        assignments: Mapping[str, Request],
        timeout_s: float,
        expected: Groups,
    ) -> Iterator[Reply]:
        """Send each named client its assignment; yield one `Reply` for each, as they arrive.

        Args:
            expected: groups with the names and shapes that a reply may hold; nothing else is
                fetched.
        """

    def take_notes(self) -> list[str]:
        """What has happened since the last call that counts for no client, in words."""
