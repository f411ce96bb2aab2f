"""The messages between server and clients, as plain dataclasses."""

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
"""Valid site names. They serve as file names, table labels and spreadsheet cells, and no two may
look alike: only ASCII, no whitespace, and nothing that a spreadsheet would read as a formula."""
SITE_NAME_RULE = (
    "use letters, digits, '.', '_' and '-', at most 63, starting with a letter or digit"
)
FROZEN = "frozen"
"""Group of factors that clients apply in addition to the adapter and do not train."""
PERSONAL = "personal_"
"""Prefix of the scores of a client's personal adapter, reported with those of the global one."""
_MOST_METRICS, _LONGEST_METRIC, _LARGEST_METRIC = 64, 64, 1e12
_METRIC = re.compile(r"[A-Za-z0-9_./-]{1,64}")
_LONGEST_TEXT = 500  # characters shown of a message from a client


@dataclass(frozen=True)
class Acknowledged:
    """The updates that the server has accepted from one client in a run.

    ``round`` is the round of the newest accepted update, 0 before the first; ``updates`` is the
    number of accepted updates.
    """

    round: int = 0
    updates: int = 0


@dataclass(frozen=True)
class Download:
    """Tensors of an assignment as they travel with ``communication.downlink`` (`downlink`).

    Their names are ``group/name``.

    Args:
        digest: of the tensors that the client ends up with.
        whole: the tensors before the steps; None: those that the client has received in its
            acknowledged round.
        steps: quantized changes of them, the oldest first.
    """

    digest: str
    whole: Params | None = None
    steps: tuple[Params, ...] = ()

    @property
    def groups(self) -> Groups:
        """The groups of tensors to send."""
        whole = {} if self.whole is None else {"whole": self.whole}
        return whole | {f"step.{number}": step for number, step in enumerate(self.steps, 1)}


@dataclass(frozen=True)
class Assignment:
    """One round's work for one client: to train, or to score the global adapter.

    Args:
        round: server round, starting at 1.
        params: the global adapter w.
        learning_rate: local learning rate of this round.
        config: the run's configuration, which defines the client's task and algorithm.
        sent: groups of tensors other than the adapter, by name: those of the algorithm (SCAFFOLD's
            c as ``control``) and those of the training task (DPO's ``reference``).
        run: id of the run, which separates its client memory from that of other runs.
        acknowledged: the updates that the server has accepted from this client. The client starts
            from its memory of that round, and from the position in its data after that many
            updates.
        oldest_checkpoint: round of the oldest checkpoint that the server may resume from, which
            would bring back an older acknowledged round.
        seeded: digest of the adapter tensors that are not sent, because they keep the initial
            value drawn from the run's seed; "" if all tensors are sent.
        session: secure-aggregation session, with the keys of the round's clients.
        download: what travels in place of the tensors if the downlink is compressed. The tensors
            are then the server's own; the client replaces them by what it receives.
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
    download: Download | None = None

    @property
    def tensors(self) -> Groups:
        """All groups of tensors, including the global adapter as ``params``."""
        return {"params": self.params, **self.sent}

    @property
    def on_wire(self) -> Groups:
        """The groups of tensors that travel."""
        return self.tensors if self.download is None else self.download.groups


@dataclass(frozen=True)
class Update:
    """A client's answer after training.

    Args:
        delta: D_i = w_i - w.
        num_examples: number of distinct examples used in this round.
        metrics: metrics of local training, including ``loss``.
        contributed: further groups of tensors that the algorithm requires.
        lost: whether the client has lost its memory of the acknowledged round. It has then started
            from the global adapter, and from zero for memory whose change it contributes.
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
        words: the masked vector: the weighted update, the algorithm's further groups, and the
            weight (`federation.masked_round`).
        sealed: secret shares by neighbour, each encrypted for that neighbour.
        num_examples, metrics: as in `Update`.
    """

    words: Words
    sealed: Mapping[str, bytes]
    num_examples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class LocalScores:
    """A client's scores of the global adapter on its own held-out records."""

    metrics: dict[str, float]
    num_examples: int


@dataclass(frozen=True)
class ClientInfo:
    """A node's description of itself, requested at the start of a run.

    ``rank`` is the rank of its adapter; 0 means the run's ``lora.r``.
    """

    name: str
    num_examples: int
    version: str
    model: str = ""  # a site's base model: embedded, id@commit, or sha256:... of its directory
    rank: int = 0
    card: str = ""  # its public keys for secure aggregation, see `secure.keys.KeyCard`


@dataclass(frozen=True)
class Failure:
    """A client's error reply. ``reason`` never quotes data; ``client`` is its name, if known."""

    kind: str
    reason: str
    client: str = ""


def require_version(theirs: str) -> None:
    """Reject a server of another version, whose settings may have another meaning.

    Raises:
        FederationError: the versions differ.
    """
    if theirs != __version__:
        text = (
            f"this site runs fedllm-flwr {__version__}, the server {theirs}; install one version "
            f"on both: pip install fedllm-flwr=={theirs}"
        )
        raise FederationError(text, text)


def printable(text: str) -> str:
    """The first line of a client's message, truncated and without control characters."""
    first = next(iter(text.strip().splitlines()), "unknown")
    return "".join(char for char in first[:_LONGEST_TEXT] if char.isprintable())


def check_metrics(metrics: Mapping[str, float], with_loss: bool = True) -> None:
    """Reject metrics without a loss, too many metrics, and invalid names or values.

    Metrics are stored, plotted and printed, so names are short, and values are finite and small
    enough for their mean to be finite.

    Args:
        with_loss: whether a loss is required; clients with record-level privacy do not report one.

    Raises:
        FederationError: the message says what is wrong.
    """
    if with_loss and "loss" not in metrics:
        raise FederationError("its metrics contain no 'loss'")
    if len(metrics) > _MOST_METRICS:
        raise FederationError(f"it reports {len(metrics)} metrics, more than {_MOST_METRICS}")
    for name, value in metrics.items():
        if not _METRIC.fullmatch(name):
            shown = repr(name[:_LONGEST_METRIC])
            raise FederationError(
                f"it reports a metric named {shown} ({len(name)} characters); a name has at most "
                f"{_LONGEST_METRIC} letters, digits and '_', '.', '/', '-'"
            )
        if not abs(value) <= _LARGEST_METRIC:
            raise NotFiniteError(f"its {name} is {value:g}, not within {_LARGEST_METRIC:g} of 0")
