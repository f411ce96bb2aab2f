"""Who takes part: each node is asked for its name, at the start and when a new one appears."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.errors import FederationError
from fedllm_flwr.params import LARGEST_WEIGHT
from fedllm_flwr.strategies.exchange import (
    Client,
    Roster,
    failure_reason,
    is_gone,
    patiently,
    printable,
    receive,
    send,
    time_to_live,
)
from fedllm_flwr.wire import pack_query, unpack_failure, unpack_info

_LONGEST_NAME = 100
_QUIET_S = 10.0  # without news, after which a start no longer waits for more than it needs
_RETURN_S = 10.0  # that a round waits for a new node to say who it is
_REMIND_S = 15.0  # between two lines about a start that still waits
_POLL_FIRST_S, _POLL_LAST_S = 0.02, 0.2


@dataclass
class Census:
    """Asks every connected node once for its name, number of examples and package version.

    ``clients`` can take part; ``refused`` says by name why others cannot; ``notes`` are on nodes
    that count for no client. Once it is `closed`, the names are settled: a node of a known name
    takes the place of one that has left, as a site without a registered key gets a new node id
    at each start.
    """

    grid: Grid
    config: Config
    clients: Roster = field(default_factory=dict)
    closed: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clients = dict(self.clients)
        self._asked: dict[str, int] = {}  # node ids by message, until they answer
        self._answered = {client.node_id for client in self.clients.values()}
        self._online: set[int] = set()
        self._doubles: dict[str, Client] = {}  # of a name whose node still counts as online

    @property
    def num_silent(self) -> int:
        """Nodes that were asked and have not answered."""
        return len(self._asked)

    def look(self) -> bool:
        """Ask who is new, and take the answers that have come; whether there was one.

        Raises:
            FederationError: two nodes of one name, before the names are settled.
        """
        timeout_s = self.config.federation.start_timeout_s
        self._online = patiently(lambda: set(self.grid.get_node_ids()))
        new = self._online - self._answered - set(self._asked.values())
        content, ttl = pack_query(self.config), time_to_live(timeout_s)
        self._asked |= send(
            self.grid,
            [Message(content, node_id, MessageType.QUERY, ttl=ttl) for node_id in sorted(new)],
        )
        before = len(self._asked)
        for reply in receive(self.grid, self._asked, timeout_s=0.0):
            node_id = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if node_id is not None and not is_gone(reply):  # one that is back is asked again
                self._answered.add(node_id)
                self._take(node_id, reply)
        return len(self._asked) < before

    def settled(self) -> Roster:
        """The clients in name order; those that came back under another node id by their new one.

        Raises:
            FederationError: the SuperLink does not answer.
        """
        before, deadline = set(self._asked), time.monotonic() + _RETURN_S
        self.look()
        while set(self._asked) - before and time.monotonic() < deadline:
            time.sleep(_POLL_LAST_S)
            self.look()
        for name, double in list(self._doubles.items()):
            if self.clients[name].node_id not in self._online and double.node_id in self._online:
                self.clients[name] = self._doubles.pop(name)
        return dict(sorted(self.clients.items()))

    def take_notes(self) -> list[str]:
        """The notes since the last call."""
        notes, self.notes = self.notes, []
        return notes

    def _take(self, node_id: int, reply: Message) -> None:
        if reason := failure_reason(reply):
            self.refused[_called(reply) or f"node {node_id}"] = reason
            return
        try:
            client = Client(node_id, unpack_info(reply.content))
        except FederationError as error:
            self.refused[f"node {node_id}"] = (
                f"it does not say who it is ({error}); does it run fedllm-flwr {__version__}?"
            )
            return
        name = client.info.name
        if (problem := _unfit(client)) is not None:
            self.refused[printable(name)[:_LONGEST_NAME] or f"node {node_id}"] = problem
        elif name in self.clients:
            self._take_double(name, client)
        elif self.closed:
            self.notes.append(f"{name} came after the start; it takes part once the run is resumed")
        else:
            self.clients[name] = client
            self.refused.pop(name, None)

    def _take_double(self, name: str, client: Client) -> None:
        if not self.closed:
            raise FederationError(
                f"two clients are called {name!r}; give each its own client-name in its node "
                "config."
            )
        if self.clients[name].node_id in self._online:
            self.notes.append(f"a second node is called {name}; it waits until the first is gone")
        self._doubles[name] = client


def discover(
    grid: Grid, config: Config, wanted: int, tell: Callable[[str], None] = lambda _: None
) -> Census:
    """Wait until `wanted` clients are there, and know each by its name.

    Args:
        tell: hears how the waiting for sites goes; simulated clients are there at once.

    Raises:
        FederationError: too few can take part; names those that refused, and why.
    """
    federation, census = config.federation, Census(grid, config)
    is_deployment = federation.engine == "deployment"
    started = last_news = last_told = time.monotonic()
    told, pause_s = -1, _POLL_FIRST_S
    while not _is_complete(census, wanted, time.monotonic() - last_news):
        now = time.monotonic()
        if now - started >= federation.start_timeout_s:
            break
        if census.look():
            last_news, pause_s = time.monotonic(), _POLL_FIRST_S
        else:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _POLL_LAST_S)
        if is_deployment and (0 < len(census.clients) != told or now - last_told >= _REMIND_S):
            told, last_told = len(census.clients), now
            tell(_progress(census, wanted, federation.start_timeout_s - (now - started)))
    required = wanted if federation.min_clients is None else min(federation.min_clients, wanted)
    if len(census.clients) < required or (census.refused and not is_deployment):
        raise FederationError(_too_few(census, wanted, required))
    return census


def _is_complete(census: Census, wanted: int, quiet_s: float) -> bool:
    """Whether to wait no longer: all are there, or enough are and nothing more happens."""
    if len(census.clients) + len(census.refused) < wanted:
        return False
    all_answered = census.num_silent == 0
    if census.config.federation.engine != "deployment":
        return all_answered
    return (all_answered and len(census.clients) >= wanted) or quiet_s >= _QUIET_S


def _progress(census: Census, wanted: int, left_s: float) -> str:
    names = f" ({', '.join(sorted(census.clients))})" if census.clients else ""
    silent = f", {census.num_silent} connected and not answering yet" if census.num_silent else ""
    refused = "".join(f"; {name}: {why}" for name, why in sorted(census.refused.items()))
    return (
        f"{len(census.clients)} of {wanted} clients are there{names}{silent}, waiting "
        f"{max(0.0, left_s):.0f} s more{refused}"
    )


def _too_few(census: Census, wanted: int, required: int) -> str:
    """Why a run cannot start, by name, and what to do."""
    federation = census.config.federation
    there, timeout = len(census.clients), f"{federation.start_timeout_s:.0f} s"
    if census.refused:
        reasons = "; ".join(
            f"{name} cannot take part: {why}" for name, why in sorted(census.refused.items())
        )
        needs = f"federation.min_clients={required}" if required < wanted else "all are needed"
        return f"{there} of {wanted} clients can take part ({needs}). {reasons}"
    is_deployment = federation.engine == "deployment"
    names = f" ({', '.join(sorted(census.clients))})" if census.clients and is_deployment else ""
    if census.num_silent:
        return (
            f"{there} of {wanted} clients answered within {timeout}{names}; look at the logs of "
            "the others, or raise federation.start_timeout_s."
        )
    return (
        f"{there} of {wanted} clients connected within {timeout}{names}; start the missing ones "
        f"(in simulation: --federation-config 'num-supernodes={wanted}'), or lower "
        "federation.num_clients or raise federation.start_timeout_s."
    )


def _called(reply: Message) -> str | None:
    """What a client that failed calls itself, as far as it says so."""
    try:
        failure = unpack_failure(reply.content) if reply.has_content() else None
    except FederationError:
        failure = None
    return printable(failure.client)[:_LONGEST_NAME] if failure and failure.client else None


def _unfit(client: Client) -> str | None:
    """Why a client cannot take part; None if it can."""
    name, size, version = client.info.name, client.info.num_examples, client.info.version
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        return (
            f"it calls itself {name[:_LONGEST_NAME]!r}; give it a client-name of 1 to "
            f"{_LONGEST_NAME} printable characters in its node config."
        )
    if version != __version__:
        return (
            f"it runs fedllm-flwr {printable(version)}, the server {__version__}; install one "
            f"version on both: pip install fedllm-flwr=={__version__}"
        )
    if not 1 <= size <= LARGEST_WEIGHT:
        return f"it announces {size} examples; look at its data file."
    return None
