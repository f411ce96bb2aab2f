"""ClientApp side: passes a message to the resident trainer and starts the trainer when needed."""

import contextlib
import fcntl
import hashlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flwr.app import RecordDict

from fedllm_flwr.client.requests import answer
from fedllm_flwr.client.resident.protocol import receive_frame, send_frame
from fedllm_flwr.client.site import Site
from fedllm_flwr.deployment.site_state import earlier_log
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Failure
from fedllm_flwr.federation.wire import pack_failure, unpack_failure

logger = logging.getLogger(__name__)

DEFAULT_IDLE_TIMEOUT_S = 600.0
_START_TIMEOUT_S = 120.0
_ATTEMPTS = 2  # a trainer that dies while handling a message is restarted once
_LARGEST_LOG = 10 * 2**20  # bytes; a trainer that starts then begins a new one
_DYING_S = 5.0  # time for a killed trainer to close its socket


def answer_by_resident(
    kind: str, content: RecordDict, site: Site, timeout_s: float | None = None
) -> RecordDict:
    """Answer by the resident trainer, or in this process, with a warning, if there is none.

    The site's node config may set ``resident=false``, or ``idle-timeout-s``: seconds without a
    message after which the trainer ends.

    Args:
        timeout_s: seconds after which the server no longer waits for the answer. A trainer that is
            still busy is then ended, so that it does not block the next message.
    """
    if not site.node_config.get("resident", True):
        return answer(kind, content, site)
    try:
        path = _socket_path(site)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return _logged(ask(path, kind, content, site, timeout_s), kind, site)
            except EOFError:
                logger.warning("the resident trainer died on a message (attempt %d)", attempt)
    except TimeoutError:
        reason = f"its trainer did not answer a {kind} message within {timeout_s:g} s and was ended"
        return _logged(pack_failure(Failure("TrainerHung", reason, site.name)), kind, site)
    except (OSError, FederationError) as error:
        logger.warning("no resident trainer (%s); training in this process", error)
        return answer(kind, content, site)
    reason = f"its trainer died {_ATTEMPTS} times over a {kind} message, out of memory perhaps"
    failure = Failure("TrainerDied", f"{reason}; the site's log says more", site.name)
    return _logged(pack_failure(failure), kind, site)


def _logged(content: RecordDict, kind: str, site: Site) -> RecordDict:
    """Return the answer; a failure is also logged in the SuperNode's output, with the log path."""
    if failure := unpack_failure(content):
        logger.error("%s failed: %s (log: %s)", kind, failure.reason, _log_path(site))
    return content


def ask(
    path: Path, kind: str, content: RecordDict, site: Site, timeout_s: float | None
) -> RecordDict:
    """Answer of the trainer at a socket; starts the trainer if it is not running.

    Raises:
        EOFError: the trainer died while handling the message.
        TimeoutError: the trainer did not answer in time, and was ended.
        FederationError: the trainer cannot be started.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        # A lock lets only one ClientApp at a time look for the trainer and start it.
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _connect(connection, path):
                start(connection, path, site)
        fields = {
            "kind": kind,
            "node_config": dict(site.node_config),
            "run_id": site.run_id,
            "node_id": site.node_id,
        }
        connection.settimeout(timeout_s)
        trainer = _peer(connection)
        try:
            send_frame(connection, fields, content)
            return receive_frame(connection)[1]
        except (ConnectionResetError, BrokenPipeError, EOFError) as error:
            if trainer is not None:
                _wait_for_end(trainer)  # the socket of a dying process still takes connections
            raise EOFError(str(error)) from error
        except TimeoutError:
            if trainer is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(trainer, signal.SIGKILL)
            raise


def _peer(connection: socket.socket) -> int | None:
    """Process id of the peer, if the kernel reports it."""
    if (option := getattr(socket, "SO_PEERCRED", None)) is None:
        return None
    found = connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i"))
    return int(struct.unpack("3i", found)[0])


def _wait_for_end(process: int) -> None:
    deadline = time.monotonic() + _DYING_S
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, os.WNOHANG)  # a dead child remains until it is waited for
            os.kill(process, 0)
            time.sleep(0.05)


def _connect(connection: socket.socket, path: Path) -> bool:
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def start(connection: socket.socket, path: Path, site: Site) -> None:
    """Start the trainer in its own session, and connect to it.

    The trainer watches the SuperNode's process and ends with it.

    Raises:
        FederationError: the trainer has ended, or does not listen in time.
    """
    path.unlink(missing_ok=True)
    idle = float(site.node_config.get("idle-timeout-s", DEFAULT_IDLE_TIMEOUT_S))
    log = _log_path(site)
    if log.is_file() and log.stat().st_size > _LARGEST_LOG:
        log.replace(earlier_log(log))
    with log.open("ab") as output:
        trainer = subprocess.Popen(
            [
                *(sys.executable, "-m", "fedllm_flwr.client.resident"),
                *(str(path), str(os.getppid()), str(idle)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _connect(connection, path):
        if trainer.poll() is not None:
            raise FederationError(f"it ended with status {trainer.returncode}, see {log}")
        if time.monotonic() > deadline:
            raise FederationError(f"it did not start within {_START_TIMEOUT_S:g} s, see {log}")
        time.sleep(0.05)


def _log_path(site: Site) -> Path:
    """The trainer's log: next to the site's state, or next to the socket if there is no state."""
    if "state-dir" in site.node_config:
        folder = Path(str(site.node_config["state-dir"])).expanduser()
        if folder.is_dir():
            return folder / "trainer.log"
    return _socket_path(site).with_suffix(".log")


def _socket_path(site: Site) -> Path:
    """The site's socket, in a directory that only its user can enter.

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
