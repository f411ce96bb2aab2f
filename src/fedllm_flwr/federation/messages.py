"""What server and clients say to each other, as plain dataclasses."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.errors import FederationError
from fedllm_flwr.params import Params
from fedllm_flwr.training.local_terms import LocalCorrection

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""Names of sites. They are file names, labels in tables and cells of spreadsheets, and no two may
look alike: no letters beyond ASCII, no blanks, nothing that a spreadsheet takes for a formula."""
SITE_NAME_RULE = (
    "use letters, digits, '.', '_' and '-', at most 63, starting with a letter or digit"
)


@dataclass(frozen=True)
class Acknowledged:
    """What the server has accepted of one client in a run.

    ``round`` is that of its newest accepted update, 0 before the first, and ``updates`` their
    number: how often the client has taken part, as far as the adapter knows.
    """

    round: int = 0
    updates: int = 0


@dataclass(frozen=True)
class Task:
    """One round's work for a client.

    ``params`` is the global adapter w, ``learning_rate`` the local one of this round. In an
    ``alone`` task the client goes on from its own adapter of earlier rounds, where it has one.
    ``reference`` is the adapter of DPO's reference model; None: the base model is the reference.
    ``run`` tells what a client remembers of this run from what it remembers of others.

    ``acknowledged`` differs from client to client: each starts from its memory of that round, and
    from its place in its own data after so many updates. ``oldest_checkpoint`` is the round of the
    oldest state that the server may go back to, and with it to an older acknowledged round.
    """

    round: int
    params: Params
    learning_rate: float
    config: Config
    correction: LocalCorrection = field(default_factory=LocalCorrection)
    control: Params | None = None
    alone: bool = False
    reference: Params | None = None
    run: str = ""
    acknowledged: Acknowledged = Acknowledged()
    oldest_checkpoint: int = 0

    def check_fits(self, check: Callable[[Params, str], None]) -> None:
        """Let `check` refuse each group of tensors, which it is given with its name."""
        groups = {"params": self.params, "control": self.control, "reference": self.reference}
        for what, params in groups.items():
            if params is not None:
                check(params, what)


@dataclass(frozen=True)
class Update:
    """A client's answer: ``delta`` = w_i - w, and the number of distinct examples it used.

    ``lost``: the client has no memory of the acknowledged round any more. It has started anew,
    from c_i = 0 and from the global adapter; ``control_delta`` is then c_i+ - 0.
    """

    delta: Params
    num_examples: int
    metrics: dict[str, float]
    control_delta: Params | None = None
    lost: bool = False


@dataclass(frozen=True)
class ClientInfo:
    """What a node says of itself when asked at the start of a run."""

    name: str
    num_examples: int
    version: str
    model: str = ""  # base model of a site: embedded, id@commit, or sha256:... of its directory


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
