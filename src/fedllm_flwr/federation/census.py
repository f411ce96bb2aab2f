"""Discovery of clients: each node is asked for its name, at the start and when it connects later.

Simulated clients are not asked; the server knows them (`known`).
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.config.ranks import check_names, rank_of_client
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.exchange import (
    failure_kind,
    failure_reason,
    may_answer_later,
    send,
    time_to_live,
)
from fedllm_flwr.federation.inbox import NO_TENSORS, Inbox, open_inbox
from fedllm_flwr.federation.messages import SITE_NAME, SITE_NAME_RULE, ClientInfo, printable
from fedllm_flwr.federation.roster import Client, Roster
from fedllm_flwr.federation.secure.keys import KeyCard, check_card
from fedllm_flwr.federation.wire import pack_query, unpack_failure, unpack_info
from fedllm_flwr.flower.runtime import patiently
from fedllm_flwr.params import LARGEST_WEIGHT

_LONGEST_NAME = 100  # characters; simulated clients are named by the server's own data
_QUIET_S = 10.0  # without a new client, after which a start proceeds with the required minimum
_RETURN_S = 10.0  # that a round waits for a new node to identify itself
_REMIND_S = 15.0  # between two progress lines while a start waits for clients
_POLL_FIRST_S, _POLL_LAST_S = 0.02, 0.2
_APPROVAL = "ApprovalPending"  # kind of the Failure of a site that waits for its operator
_APPROVAL_S = 3.0  # before such a site is asked again
_AGAIN_FIRST_S, _AGAIN_LAST_S = 1.0, 15.0  # backoff before asking an unavailable node again


@dataclass(frozen=True)
class Waiting:
    """A node that has not been able to answer: why, how often, and when it is asked again."""

    label: str  # its name, if known
    why: str
    tries: int
    not_before: float  # time.monotonic()


@dataclass
class Census:
    """Asks every connected node for its name, number of examples and package version.

    A node is asked until it answers. These are not refusals: Flower's error reply for a node that
    was offline, whose reply broke off or whose process died, and a site that waits for its
    operator's approval.

    ``clients`` can take part; ``refused`` maps the others to the reason; ``waiting`` are the nodes
    that have not been able to answer, by id; ``notes`` are remarks about nodes that are not
    clients. Once the census is `closed`, the names are fixed: a node with a known name then
    replaces one that has left, since a site without a registered key gets a new node id each time
    it starts.

    ``registered`` are the names of the sites' keys by node id; a node with one of these ids must
    use its name, and no other node may use it. ``keys`` are these public keys by name: under secure
    aggregation a site must sign its keys of the run with its registered key.
    """

    grid: Grid
    config: Config
    clients: Roster = field(default_factory=dict)
    closed: bool = False
    inbox: Inbox | None = None  # None: the census opens its own
    registered: Mapping[int, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    waiting: dict[int, Waiting] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clients = dict(self.clients)
        self._inbox = self.inbox or open_inbox(self.grid)
        self._asked: dict[str, int] = {}  # node ids by message id, until they answer
        self._answered = {client.node_id for client in self.clients.values()}
        self._online: set[int] = set()
        self._doubles: dict[str, Client] = {}  # second nodes of a name whose node is still online

    @property
    def silent(self) -> list[str]:
        """Nodes that have not answered their first question, by name or node id."""
        nodes = set(self._asked.values()) - set(self.waiting)
        return sorted(self._label(node_id) for node_id in nodes)

    @property
    def missing(self) -> list[str]:
        """Names of registered sites that are not connected."""
        here = self._online | {client.node_id for client in self.clients.values()}
        return sorted(name for node_id, name in self.registered.items() if node_id not in here)

    @property
    def all_answered(self) -> bool:
        """Whether no node is left that may still identify itself."""
        return not self._asked and not self.waiting

    def look(self) -> bool:
        """Ask new nodes and those due to be asked again; process the answers that have arrived.

        Returns:
            Whether a node has identified itself or has refused.
        """
        self._online = patiently(lambda: set(self.grid.get_node_ids()))
        self._ask(self._online - self._answered - set(self._asked.values()))
        before = len(self._answered)
        for reply in self._inbox.take(list(self._asked), NO_TENSORS):
            node_id = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if node_id is None:
                continue
            if (waiting := self._waiting(node_id, reply)) is not None:
                self.waiting[node_id] = waiting
                continue
            self.waiting.pop(node_id, None)
            self._answered.add(node_id)
            self._take(node_id, reply)
        return len(self._answered) > before

    def settled(self) -> Roster:
        """The clients in name order, with the new node ids of those that have reconnected.

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

    def _ask(self, nodes: set[int]) -> None:
        now = time.monotonic()
        for node_id in set(self.waiting) - self._online:  # asked at once when it reconnects
            self.waiting[node_id] = replace(self.waiting[node_id], not_before=now)
        due = [
            node_id
            for node_id in sorted(nodes)
            if node_id not in self.waiting or self.waiting[node_id].not_before <= now
        ]
        ttl = time_to_live(self.config.federation.start_timeout_s)
        content = pack_query(self.config)
        messages = [Message(content, node_id, MessageType.QUERY, ttl=ttl) for node_id in due]
        self._asked |= send(self.grid, messages)

    def _waiting(self, node_id: int, reply: Message) -> Waiting | None:
        """The `Waiting` entry of a node that could not answer; None if it has answered."""
        before = self.waiting.get(node_id)
        tries = before.tries + 1 if before else 1
        label = _called(reply) or (before.label if before else self._label(node_id))
        why = failure_reason(reply) or ""
        if failure_kind(reply) == _APPROVAL:
            return Waiting(label, why, tries, time.monotonic() + _APPROVAL_S)
        if not may_answer_later(reply):
            return None
        pause_s = 0.0 if tries == 1 else min(_AGAIN_FIRST_S * 2 ** (tries - 2), _AGAIN_LAST_S)
        return Waiting(label, why, tries, time.monotonic() + pause_s)

    def _label(self, node_id: int) -> str:
        return self.registered.get(node_id, f"node {node_id}")

    def _take(self, node_id: int, reply: Message) -> None:
        if reason := failure_reason(reply):
            self._refuse(node_id, _called(reply), reason)
            return
        try:
            client = Client(node_id, unpack_info(reply.content), node_id in self.registered)
        except FederationError as error:
            why = f"it does not identify itself ({error}); does it run fedllm-flwr {__version__}?"
            self._refuse(node_id, None, why)
            return
        name = client.info.name
        problem = self._foreign_name(client) or self._unfit(client)
        problem = problem or self._wrong_card(client.info, str(reply.metadata.run_id))
        if problem is not None:
            self._refuse(node_id, printable(name)[:_LONGEST_NAME], problem)
        elif name in self.clients:
            self._take_double(name, client)
        elif self.closed:
            self.notes.append(
                f"{name} joined after the start; it takes part once the run is resumed"
            )
        else:
            self.clients[name] = client
            self.refused.pop(name, None)

    def _refuse(self, node_id: int, called: str | None, why: str) -> None:
        """Record why a node cannot take part, under a name that no other client has."""
        is_free = called and called not in {*self.clients, *self.registered.values()}
        own = called if is_free and called else f"node {node_id}"
        self.refused[self.registered.get(node_id, own)] = why

    def _foreign_name(self, client: Client) -> str | None:
        """Why a node may not use its name: another key has the name, or its key another name."""
        name, own = client.info.name, self.registered.get(client.node_id)
        if own is not None and name != own:
            return (
                f"its key is registered as {own}, but it calls itself {printable(name)!r}; set "
                f'client-name = "{own}" in its node.toml, or register its key under the new name'
            )
        if own is None and name.casefold() in map(str.casefold, self.registered.values()):
            return f"it calls itself {name}, which is the name of another site's key"
        return None

    def _unfit(self, client: Client) -> str | None:
        """Why a client cannot take part; None if it can."""
        name, size, version = client.info.name, client.info.num_examples, client.info.version
        is_site = self.config.federation.engine == "deployment"
        if is_site and not SITE_NAME.fullmatch(name):
            called = repr(name[:_LONGEST_NAME])
            return (
                f"it calls itself {called}; for its client-name in its node.toml {SITE_NAME_RULE}"
            )
        if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
            return f"it calls itself {name[:_LONGEST_NAME]!r}, which is not a valid name"
        if version != __version__:
            return (
                f"it runs fedllm-flwr {printable(version)}, the server {__version__}; install one "
                f"version on both: pip install fedllm-flwr=={__version__}"
            )
        if not 1 <= size <= LARGEST_WEIGHT:
            return f"it announces {size} examples; check its data file."
        return None

    def _wrong_card(self, info: ClientInfo, run: str) -> str | None:
        """Why no other site would accept a site's keys for secure aggregation."""
        config = self.config
        if config.federation.engine != "deployment" or not config.privacy.secure_aggregation:
            return None
        known = self.keys.get(info.name)
        try:
            card = KeyCard.from_text(info.card)
            check_card(card, run, info.name)
        except FederationError:
            return "its keys for secure aggregation are not signed for this run; start it again"
        if known in (None, card.identity):
            return None
        return (
            "its keys for secure aggregation are signed with another key than the one that is "
            f"registered as {info.name}; the registered one belongs to its site-dir, as "
            f"{info.name}.key"
        )

    def _take_double(self, name: str, client: Client) -> None:
        first = self.clients[name]
        if first.by_key or (not self.closed and first.node_id in self._online):
            why = (
                f"two clients are called {name!r}; give each its own client-name in its node config"
            )
            if self.closed:
                self.notes.append(f"node {client.node_id} is left out: {why}")
            else:
                self._refuse(client.node_id, name, why)
        elif not self.closed:
            self.clients[name] = client
        else:
            if first.node_id in self._online:
                self.notes.append(
                    f"a second node is called {name}; it waits until the first is gone"
                )
            self._doubles[name] = client


def known(grid: Grid, config: Config, sizes: Mapping[str, int]) -> Census:
    """All clients of a simulation; the server knows them from its own data and asks no node.

    Args:
        sizes: number of training examples by client, in partition order.

    Raises:
        ConfigError: an entry of ``lora.ranks`` matches no client.
        FederationError: the simulation has not created a node for each client in time.
    """
    check_names(config, sizes)
    deadline = time.monotonic() + config.federation.start_timeout_s
    while len(nodes := sorted(patiently(lambda: list(grid.get_node_ids())))) < len(sizes):
        if time.monotonic() >= deadline:
            raise FederationError(_too_few(Census(grid, config), len(sizes), len(sizes)))
        time.sleep(_POLL_FIRST_S)
    clients = {}
    for node_id, (name, size) in zip(nodes, sizes.items(), strict=False):
        rank = rank_of_client(config, name) % config.lora.r
        clients[name] = Client(node_id, ClientInfo(name, size, __version__, rank=rank))
    return Census(grid, config, clients)


def discover(
    grid: Grid,
    config: Config,
    wanted: int,
    tell: Callable[[str], None] = lambda _: None,
    registered: Mapping[int, str] | None = None,
    keys: Mapping[str, str] | None = None,
) -> Census:
    """Wait until `wanted` clients have connected and identified themselves.

    Args:
        tell: called with progress lines while sites connect.
        registered: names of the sites' registered keys by node id.
        keys: these public keys by name.

    Raises:
        FederationError: too few clients can take part; names those that refused, and why.
    """
    federation = config.federation
    census = Census(grid, config, registered=registered or {}, keys=keys or {})
    is_deployment = federation.engine == "deployment"
    started = last_news = last_told = time.monotonic()
    told: object = None
    pause_s = _POLL_FIRST_S
    while not _is_complete(census, wanted, time.monotonic() - last_news):
        now = time.monotonic()
        if now - started >= federation.start_timeout_s:
            break
        if census.look():
            last_news, pause_s = time.monotonic(), _POLL_FIRST_S
        else:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _POLL_LAST_S)
        known = (
            sorted(census.clients),
            sorted((node.label, node.why) for node in census.waiting.values()),
        )
        if is_deployment and ((any(known) and known != told) or now - last_told >= _REMIND_S):
            told, last_told = known, now
            tell(_progress(census, wanted, federation.start_timeout_s - (now - started)))
    required = wanted if federation.min_clients is None else min(federation.min_clients, wanted)
    if len(census.clients) < required or (census.refused and not is_deployment):
        raise FederationError(_too_few(census, wanted, required))
    return census


def _is_complete(census: Census, wanted: int, quiet_s: float) -> bool:
    """Whether to stop waiting: all clients are here, or enough are and no more arrive."""
    if len(census.clients) + len(census.refused) < wanted:
        return False
    if census.config.federation.engine != "deployment":
        return census.all_answered
    return (census.all_answered and len(census.clients) >= wanted) or quiet_s >= _QUIET_S


def _progress(census: Census, wanted: int, left_s: float) -> str:
    names = f" ({', '.join(sorted(census.clients))})" if census.clients else ""
    return (
        f"{len(census.clients)} of {wanted} clients are connected{names}, waiting "
        f"{max(0.0, left_s):.0f} s more{_others(census)}"
    )


def _others(census: Census) -> str:
    """The state of nodes and sites that do not take part yet, as the end of a progress line."""
    parts = [f"{node.label}: {node.why}" for node in census.waiting.values()]
    parts += [f"{name}: connected, no answer yet" for name in census.silent]
    parts += [f"{name}: registered, not connected" for name in census.missing]
    parts += [f"{name}: {why}" for name, why in census.refused.items()]
    return "".join(f"; {part}" for part in sorted(parts))


def _too_few(census: Census, wanted: int, required: int) -> str:
    """Why a run cannot start, by client name, and the remedy."""
    federation = census.config.federation
    there, timeout = len(census.clients), f"{federation.start_timeout_s:.0f} s"
    others = {node.label: node.why for node in census.waiting.values()} | census.refused
    if others:
        reasons = "; ".join(f"{name} cannot take part: {why}" for name, why in others.items())
        needs = f"federation.min_clients={required}" if required < wanted else "all are needed"
        missing = "".join(f"; {name} is registered, not connected" for name in census.missing)
        return f"{there} of {wanted} clients can take part ({needs}). {reasons}{missing}"
    is_deployment = federation.engine == "deployment"
    names = f" ({', '.join(sorted(census.clients))})" if census.clients and is_deployment else ""
    missing = f" Not connected: {', '.join(census.missing)}." if census.missing else ""
    if census.silent:
        silent = f" No answer yet: {', '.join(census.silent)}." if is_deployment else ""
        return (
            f"{there} of {wanted} clients answered within {timeout}{names}; check the logs of "
            f"the others, or raise federation.start_timeout_s.{silent}{missing}"
        )
    return (
        f"{there} of {wanted} clients connected within {timeout}{names}; start the missing ones "
        f"(in simulation: --federation-config 'num-supernodes={wanted}'), or lower "
        f"federation.num_clients or raise federation.start_timeout_s.{missing}"
    )


def _called(reply: Message) -> str | None:
    """The name in a client's `Failure`, if there is one."""
    try:
        failure = unpack_failure(reply.content) if reply.has_content() else None
    except FederationError:
        failure = None
    return printable(failure.client)[:_LONGEST_NAME] if failure and failure.client else None
