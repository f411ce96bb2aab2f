"""`Channel`: how rounds send requests to clients and receive their replies."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Assignment, LocalScores, MaskedUpdate, Update
from fedllm_flwr.federation.roster import Roster
from fedllm_flwr.federation.secure.site import Opened, Signed, Unmask
from fedllm_flwr.params import Groups

ClientRequest = Assignment | Unmask
ReplyContent = Update | MaskedUpdate | LocalScores | Signed | Opened


class RequestKind(StrEnum):
    """The request to a client, as Flower's message type."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    SIGN = "query.sign"
    UNMASK = "query.unmask"


class NoReplyError(FederationError):
    """A client has not replied."""


@dataclass(frozen=True)
class Reply:
    """A client's answer to a request, or the error if it has no usable answer."""

    client: str
    answer: ReplyContent | FederationError


class Channel(Protocol):
    """Connection to the clients of a run."""

    @property
    def roster(self) -> Roster:
        """The clients as of the last call of `settle`."""

    def settle(self) -> None:
        """Update the roster: find clients that have reconnected under another address."""

    def exchange(
        self,
        request: RequestKind,
        assignments: Mapping[str, ClientRequest],
        timeout_s: float,
        expected: Groups,
    ) -> Iterator[Reply]:
        """Send each named client its request; yield one `Reply` per client as they arrive.

        Args:
            expected: groups with the names and shapes that a reply may contain; nothing else is
                fetched.
        """

    def take_notes(self) -> list[str]:
        """Remarks since the last call that are not part of any client's reply."""
