"""The resident trainer: answers one message after the other, and keeps model and data between them.

Flower starts a process for each message; importing torch and loading the base model then cost more
than a round's training. This process stays: it is started by the first ClientApp that needs it,
and ends with the SuperNode, or when nothing has come for a while, which frees the GPU.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedllm_flwr.client.requests import Site, answer
from fedllm_flwr.client.resident.protocol import receive_frame, send_frame
from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.errors import FederationError

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_MESSAGE_S = 300.0  # for a message to come, once a peer has connected


def serve(path: Path, parent: int, idle_timeout_s: float) -> None:
    """Answer on the Unix socket `path`, until process `parent` is gone or nothing has come.

    One message at a time; those who come meanwhile wait in the socket's queue.
    """
    prepare_environment()
    with socket.socket(socket.AF_UNIX) as listener, _removed_at_the_end(path):
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(_POLL_S)
        threading.Thread(target=_end_with, args=(parent, path), daemon=True).start()
        last = time.monotonic()
        while time.monotonic() - last < idle_timeout_s:
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection:
                    _answer(connection)
                last = time.monotonic()


def _answer(connection: socket.socket) -> None:
    """One message and its answer; a peer that is gone, or sends no message, is left alone."""
    try:
        connection.settimeout(_MESSAGE_S)
        fields, content = receive_frame(connection)
        kind, site = _asked(fields)
        connection.settimeout(None)
        send_frame(connection, {}, answer(kind, content, site))
    except (OSError, EOFError, FederationError) as error:
        logger.warning("a message was dropped: %s", error)


def _asked(fields: dict[str, Any]) -> tuple[str, Site]:
    """The kind of a message and the site that it is for.

    Raises:
        FederationError: a field is missing or of another type.
    """
    kinds = {"kind": str, "node_config": dict, "run_id": int, "node_id": int}
    for name, kind in kinds.items():
        if not isinstance(fields.get(name), kind):
            raise FederationError(
                f"not a message of this package (its {name} is no {kind.__name__})"
            )
    return fields["kind"], Site(fields["node_config"], fields["run_id"], fields["node_id"])


def _end_with(parent: int, path: Path) -> None:
    """End this process, whatever it does, soon after `parent` has ended."""
    while _is_alive(parent):
        time.sleep(_POLL_S)
    path.unlink(missing_ok=True)
    os._exit(0)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _removed_at_the_end(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
