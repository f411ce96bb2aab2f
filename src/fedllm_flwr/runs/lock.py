"""Run lock and live round status, readable from other processes.

The process of a run holds a lock on ``run.lock``, which the system releases when the process ends
for any reason; ``round.json`` contains the current round. A completed run leaves neither file.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

import psutil

from fedllm_flwr.errors import FederationError
from fedllm_flwr.runs.directory import RunDirectory

_TRIES, _PAUSE_S = 10, 0.05  # a reader of the status holds the lock for a moment


@dataclass(frozen=True)
class Holder:
    """The process of a run, as described in ``run.lock``.

    ``error`` is the error that ended it; empty while it runs, and if it was killed. ``command``
    plus ``resume=`` resumes the run; ``flower_run`` is Flower's id of the run in a deployment.
    """

    pid: int
    host: str
    started: float  # seconds since 1970
    error: str = ""
    is_alive: bool = False
    command: str = "fedllm run"
    flower_run: str = ""

    @property
    def was_killed(self) -> bool:
        """Whether the process ended without reporting an error; False on another machine."""
        if self.is_alive or self.error or self.host != socket.gethostname():
            return False
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


@dataclass
class CurrentRound:
    """The current round: its sampled clients, and those that have replied so far."""

    round: int
    asked: list[str]
    started: float  # seconds since 1970
    losses: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def waiting(self) -> list[str]:
        """Clients that have not replied yet."""
        return [name for name in self.asked if name not in {*self.losses, *self.failed}]


class RoundBoard:
    """Keeps ``round.json`` up to date; errors while writing it do not end the run."""

    def __init__(self, directory: RunDirectory) -> None:
        self._path = directory.current_round
        self._current = CurrentRound(0, [], 0.0)

    def start_round(self, round: int, names: Sequence[str]) -> None:
        """Record the sampled clients of a new round."""
        self._current = CurrentRound(round, list(names), time.time())
        self._write()

    def reply(self, round: int, name: str, loss: float | None) -> None:
        """Record a client's reply; loss None: without a usable update."""
        if loss is None:
            self._current.failed.append(name)
        else:
            self._current.losses[name] = loss
        self._write()

    def _write(self) -> None:
        temporary = self._path.with_name(f".{self._path.name}")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(asdict(self._current)), "utf-8")
            temporary.replace(self._path)


@contextlib.contextmanager
def held(
    directory: RunDirectory, command: str = "fedllm run", flower_run: str = ""
) -> Iterator[None]:
    """Hold the run's lock, which shows that the run is alive and prevents a second process.

    Args:
        command: command that resumes the run when ``resume=`` is added.
        flower_run: Flower's id of the run in a deployment.

    Raises:
        FederationError: another process holds the lock.
    """
    with directory.lock.open("a+", encoding="utf-8") as file:
        for _ in range(_TRIES):
            if _try(file, fcntl.LOCK_EX):
                break
            time.sleep(_PAUSE_S)
        else:
            other = holder(directory)
            who = f"process {other.pid} on {other.host}" if other else "another process"
            raise FederationError(
                f"{directory.path}: {who} is at this run; wait until it has ended, or stop it "
                "first."
            )
        me = Holder(
            os.getpid(), socket.gethostname(), time.time(), command=command, flower_run=flower_run
        )
        _write_holder(file, me)
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)  # Ctrl-C, `flwr stop`
            said = "interrupted" if interrupted else str(error) or repr(error)
            _write_holder(file, replace(me, error=said))
            raise
        for path in (directory.current_round, directory.lock):
            path.unlink(missing_ok=True)


def holder(directory: RunDirectory) -> Holder | None:
    """The process of a run that has not completed; None for a completed run."""
    try:
        with directory.lock.open("r", encoding="utf-8") as file:
            is_alive = not _try(file, fcntl.LOCK_SH)
            return Holder(**{**json.load(file), "is_alive": is_alive})
    except (OSError, ValueError, TypeError):
        return None


def current_round(directory: RunDirectory) -> CurrentRound | None:
    """The current round, or the round in which the run stopped; None before the first."""
    try:
        return CurrentRound(**json.loads(directory.current_round.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _try(file: IO[str], kind: int) -> bool:
    """Whether the lock was acquired; always true on a file system without locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _write_holder(file: IO[str], me: Holder) -> None:
    values: dict[str, Any] = asdict(me)
    with contextlib.suppress(OSError):
        file.seek(0)
        file.truncate()
        file.write(json.dumps(values))
        file.flush()
