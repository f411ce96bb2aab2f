"""What server and clients say to each other, as plain dataclasses."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.errors import FederationError, NotFiniteError
from fedllm_flwr.federation.secure.graph import Session
from fedllm_flwr.federation.secure.masks import Words
from fedllm_flwr.params import Groups, Params

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""Names of sites. They are file names, labels in tables and cells of spreadsheets, and no two may
look alike: no letters beyond ASCII, no blanks, nothing that a spreadsheet takes for a formula."""
SITE_NAME_RULE = (
    "use letters, digits, '.', '_' and '-', at most 63, starting with a letter or digit"
)
FROZEN = "frozen"
"""Group of factors that clients have beside the adapter and do not train."""
PERSONAL = "personal_"
"""Prefix of the scores of a client's own adapter, beside those of the global one."""
_MOST_METRICS, _LONGEST_METRIC, _LARGEST_METRIC = 64, 64, 1e12
_METRIC = re.compile(r"[A-Za-z0-9_./-]{1,64}")
_LONGEST_TEXT = 500  # characters of a client's wording that are shown


@dataclass(frozen=True)
class Acknowledged:
    """What the server has accepted of one client in a run.

    ``round`` is that of its newest accepted update, 0 before the first, and ``updates`` their
    number: how often the client has taken part, as far as the adapter knows.
    """

    round: int = 0
    updates: int = 0


@dataclass(frozen=True)
class Assignment:
    """One round's work for one client: to train, or to score the global adapter.

    Args:
        round: server round, from 1.
        params: the global adapter w.
        learning_rate: the local one of this round.
        config: the run's configuration, from which the client takes task and algorithm.
        sent: groups of tensors beside the adapter, by name: what the algorithm sends (SCAFFOLD's
            c as ``control``), and what the training task sends (DPO's ``reference``).
        run: tells what a client remembers of this run from what it remembers of others.
        acknowledged: what the server has accepted of this client. It starts from its memory of that
            round, and from its place in its own data after so many updates.
        oldest_checkpoint: round of the oldest state that the server may go back to, and with it to
            an older acknowledged round.
        seeded: digest of those tensors of the adapter that are not sent, because they stay as they
            were drawn from the run's seed; "" where all are.
        session: of secure aggregation, with the keys of the round's clients.
    """

    round: int
    params: Params
    learning_rate: float
    config: Config
    sent: Groups = field(default_factory=dict)
    run: str = ""
    acknowledged: Acknowledged = Acknowledged()
    oldest_checkpoint: int = 0
    seeded: str = ""
    session: Session | None = None

    @property
    def tensors(self) -> Groups:
        """All groups of tensors, the global adapter among them as ``params``."""
        return {"params": self.params, **self.sent}


@dataclass(frozen=True)
class Update:
    """A client's answer after training.

    Args:
        delta: D_i = w_i - w.
        num_examples: number of distinct examples it has used in this round.
        metrics: figures of local training, ``loss`` among them.
        contributed: groups of tensors beside ``delta`` that the algorithm asks for.
        lost: the client has no memory of the acknowledged round any more. It has started anew from
            the global adapter, and from zero where a contribution is the change of its memory.
    """

    delta: Params
    num_examples: int
    metrics: dict[str, float]
    contributed: Groups = field(default_factory=dict)
    lost: bool = False


@dataclass(frozen=True)
class MaskedUpdate:
    """A client's answer after training under secure aggregation.

    Args:
        words: the masked vector: the update times the weight, what the algorithm asks for, the
            weight (`federation.masked_round`).
        sealed: by neighbour, shares that only it can read.
        num_examples, metrics: as in `Update`.
    """

    words: Words
    sealed: Mapping[str, bytes]
    num_examples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class LocalScores:
    """A client's answer to the question how good the global adapter is on its held-out records."""

    metrics: dict[str, float]
    num_examples: int


@dataclass(frozen=True)
class ClientInfo:
    """What a node says of itself when asked at the start of a run.

    ``rank`` is that of its adapter; 0: that of the run.
    """

    name: str
    num_examples: int
    version: str
    model: str = ""  # base model of a site: embedded, id@commit, or sha256:... of its directory
    rank: int = 0
    card: str = ""  # its keys for secure aggregation, see `secure.keys.KeyCard`


@dataclass(frozen=True)
class Failure:
    """A client's refusal, in wording that quotes no data; ``client`` is its name, if it has one."""

    kind: str
    reason: str
    client: str = ""


def require_version(theirs: str) -> None:
    """Refuse a server of another version, whose settings may mean something else.

    Raises:
        FederationError: names both versions.
    """
    if theirs != __version__:
        text = (
            f"this site runs fedllm-flwr {__version__}, the server {theirs}; install one version "
            f"on both: pip install fedllm-flwr=={theirs}"
        )
        raise FederationError(text, text)


def printable(text: str) -> str:
    """The first line of a client's wording, bounded, without control characters."""
    first = next(iter(text.strip().splitlines()), "unknown")
    return "".join(char for char in first[:_LONGEST_TEXT] if char.isprintable())


def check_metrics(metrics: Mapping[str, float], with_loss: bool = True) -> None:
    """Refuse metrics that lack a loss, are too many, or have names or values out of bounds.

    A round's metrics are kept in memory, written down, drawn and printed; so none may be long,
    not finite, or so large that a mean or a figure of them is not finite.

    Args:
        with_loss: whether a loss is needed; clients whose records are private do not tell theirs.

    Raises:
        FederationError: says which.
    """
    if with_loss and "loss" not in metrics:
        raise FederationError("its metrics lack 'loss'")
    if len(metrics) > _MOST_METRICS:
        raise FederationError(f"it holds {len(metrics)} metrics, more than {_MOST_METRICS}")
    for name, value in metrics.items():
        if not _METRIC.fullmatch(name):
            shown = repr(name[:_LONGEST_METRIC])
            raise FederationError(
                f"it calls a metric of {len(name)} characters {shown}; at most {_LONGEST_METRIC} "
                "letters, digits and '_', '.', '/', '-' are taken"
            )
        if not abs(value) <= _LARGEST_METRIC:
            raise NotFiniteError(f"its {name} is {value:g}, not within {_LARGEST_METRIC:g} of 0")
