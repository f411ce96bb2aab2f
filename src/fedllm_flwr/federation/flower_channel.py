"""`FlowerChannel`: the channel to clients over a Flower grid of any engine or network."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from fedllm_flwr.config import Config
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.census import Census
from fedllm_flwr.federation.channel import (
    ClientRequest,
    NoReplyError,
    Reply,
    ReplyContent,
    RequestKind,
)
from fedllm_flwr.federation.exchange import receive, send, time_to_live
from fedllm_flwr.federation.inbox import NO_TENSORS, Expected, open_inbox
from fedllm_flwr.federation.replies import (
    Asked,
    read_opened,
    read_scores,
    read_signed,
    read_update,
)
from fedllm_flwr.federation.roster import Roster
from fedllm_flwr.federation.wire import pack_requests
from fedllm_flwr.params import Groups


class FlowerChannel:
    """The channel to clients over a Flower grid.

    Args:
        roster: the clients of the run by name.
    """

    def __init__(self, grid: Grid, config: Config, roster: Roster) -> None:
        self._grid = grid
        self._config = config
        self._inbox = open_inbox(grid)
        self._census = Census(grid, config, roster, closed=True, inbox=self._inbox)
        self._notes: list[str] = []
        self.roster = roster

    def settle(self) -> None:
        """Ask new nodes to identify themselves."""
        self.roster = self._census.settled()

    def messages(
        self, request: RequestKind, assignments: Mapping[str, ClientRequest], timeout_s: float
    ) -> list[Message]:
        """Flower messages to the named clients; equal contents are shared between them."""
        ttl = time_to_live(timeout_s)
        contents = pack_requests(assignments.values())
        return [
            Message(content, self.roster[name].node_id, request, ttl=ttl)
            for name, content in zip(assignments, contents, strict=True)
        ]

    def exchange(
        self,
        request: RequestKind,
        assignments: Mapping[str, ClientRequest],
        timeout_s: float,
        expected: Groups,
    ) -> Iterator[Reply]:
        """As `Channel.exchange`.

        Raises:
            FederationError: the SuperLink does not answer.
        """
        node_ids = send(self._grid, self.messages(request, assignments, timeout_s))
        asked = Asked(node_ids, self.roster)
        bounds = Expected.like(**expected) if expected else NO_TENSORS
        messages = receive(self._inbox, node_ids, timeout_s, bounds)
        yield from self.read(request, messages, asked, assignments, timeout_s)

    def read(
        self,
        request: RequestKind,
        messages: Iterable[Message],
        asked: Asked,
        names: Collection[str],
        timeout_s: float,
    ) -> Iterator[Reply]:
        """One `Reply` for each of `names`, with an error for each missing reply."""
        answered: set[str] = set()
        for message in messages:
            try:
                name = asked.client_of(message)
            except FederationError as error:
                self._notes.append(str(error))
                continue
            answered.add(name)
            yield Reply(name, _answer(request, message))
            del message  # otherwise it stays in memory until the next one arrives
        for name in names:
            if name not in asked.names:
                yield Reply(name, NoReplyError("not connected"))
            elif name not in answered:
                yield Reply(name, NoReplyError(f"no reply within {timeout_s:g} s"))

    def take_notes(self) -> list[str]:
        """Remarks on unexpected and duplicate replies, and on nodes that joined too late."""
        notes, self._notes = [*self._notes, *self._census.take_notes()], []
        return notes


_READERS: dict[RequestKind, Callable[[Message], ReplyContent]] = {
    RequestKind.TRAIN: read_update,
    RequestKind.EVALUATE: read_scores,
    RequestKind.SIGN: read_signed,
    RequestKind.UNMASK: read_opened,
}


def _answer(request: RequestKind, message: Message) -> ReplyContent | FederationError:
    try:
        return _READERS[request](message)
    except FederationError as error:
        return error
