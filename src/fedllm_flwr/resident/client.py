"""The ClientApp's side: hand a message to the resident trainer, which is started when needed."""

import contextlib
import fcntl
import hashlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from flwr.app import RecordDict

from fedllm_flwr.errors import FederationError
from fedllm_flwr.messages import Failure
from fedllm_flwr.resident.protocol import receive_frame, send_frame
from fedllm_flwr.site import Site, answer
from fedllm_flwr.wire import pack_failure

logger = logging.getLogger(__name__)

DEFAULT_IDLE_TIMEOUT_S = 600.0
_START_TIMEOUT_S = 30.0
_ATTEMPTS = 2  # a trainer that dies over a message is started once more


def answer_by_resident(kind: str, content: RecordDict, site: Site) -> RecordDict:
    """The resident trainer's answer; without one this process answers itself, with a warning.

    The site's node config may set ``resident=false``, or ``idle-timeout-s``: seconds without a
    message after which the trainer ends.
    """
    if not site.node_config.get("resident", True):
        return answer(kind, content, site)
    try:
        path = _socket_path(site)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return _ask(path, kind, content, site)
            except EOFError:
                logger.warning("the resident trainer died over a message (attempt %d)", attempt)
    except (OSError, FederationError) as error:
        logger.warning("no resident trainer (%s); this process trains itself", error)
        return answer(kind, content, site)
    reason = f"its trainer died {_ATTEMPTS} times over a {kind} message, out of memory perhaps"
    return pack_failure(Failure("TrainerDied", f"{reason}; the site's log says more", site.name))


def _ask(path: Path, kind: str, content: RecordDict, site: Site) -> RecordDict:
    with _connected(path, site) as connection:
        fields = {
            "kind": kind,
            "node_config": dict(site.node_config),
            "run_id": site.run_id,
            "node_id": site.node_id,
        }
        try:
            send_frame(connection, fields, content)
            return receive_frame(connection)[1]
        except (ConnectionResetError, BrokenPipeError) as error:
            raise EOFError(str(error)) from error


@contextlib.contextmanager
def _connected(path: Path, site: Site) -> Iterator[socket.socket]:
    """A connection to the trainer, which is started if nobody answers on the socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        with _only_one(path):
            if not _connect(connection, path):
                _start(path, site)
                _wait(connection, path)
        yield connection


def _connect(connection: socket.socket, path: Path) -> bool:
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def _start(path: Path, site: Site) -> None:
    """Start the trainer in a session of its own, with the SuperNode as the parent to watch."""
    path.unlink(missing_ok=True)
    idle = float(site.node_config.get("idle-timeout-s", DEFAULT_IDLE_TIMEOUT_S))
    arguments = [str(path), str(os.getppid()), str(idle)]
    with path.with_suffix(".log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "fedllm_flwr.resident", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wait(connection: socket.socket, path: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _connect(connection, path):
        if time.monotonic() > deadline:
            raise FederationError(
                f"it did not start within {_START_TIMEOUT_S:g} s, see {path.with_suffix('.log')}"
            )
        time.sleep(0.05)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Let one ClientApp at a time look for the trainer and start it."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _socket_path(site: Site) -> Path:
    """The site's socket, in a directory that its user alone can enter.

    Raises:
        FederationError: the directory belongs to someone else.
    """
    directory = Path(tempfile.gettempdir()) / f"fedllm-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or directory.is_symlink():
        raise FederationError(f"{directory} is open to others; remove it")
    identity = repr((site.node_id, sorted(site.node_config.items())))
    return directory / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.sock"
