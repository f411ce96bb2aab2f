"""Resident trainer: answers messages one at a time and keeps model and data loaded between them.

Flower starts a process for each message, in which importing torch and loading the base model take
longer than a round's training. The resident trainer keeps running: the first ClientApp that needs
it starts it, and it ends with the SuperNode, or when idle for some time, which frees the GPU.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from pathlib import Path

from fedllm_flwr.client.requests import answer
from fedllm_flwr.client.resident.protocol import receive_frame, send_frame
from fedllm_flwr.client.site import Site
from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.errors import FederationError

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_MESSAGE_S = 300.0  # to receive a message, once a peer has connected
_FIELDS = {"kind": str, "node_config": dict, "run_id": int, "node_id": int}


def serve(path: Path, parent: int, idle_timeout_s: float) -> None:
    """Answer on the Unix socket `path`, until process `parent` ends or the idle timeout passes.

    Handles one message at a time; further peers wait in the socket's queue.
    """
    prepare_environment()

    def end_with_parent() -> None:  # promptly, even while this process is busy
        while True:
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
                os._exit(0)
            except PermissionError:
                pass  # it exists, but belongs to another user
            time.sleep(_POLL_S)

    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.settimeout(_POLL_S)
            threading.Thread(target=end_with_parent, daemon=True).start()
            last = time.monotonic()
            while time.monotonic() - last < idle_timeout_s:
                with contextlib.suppress(TimeoutError):
                    connection, _ = listener.accept()
                    with connection:
                        handle(connection)
                    last = time.monotonic()
    finally:
        path.unlink(missing_ok=True)


def handle(connection: socket.socket) -> None:
    """Answer one message; incomplete messages, and those of other programs, are dropped."""
    try:
        connection.settimeout(_MESSAGE_S)
        fields, content = receive_frame(connection)
        for name, kind in _FIELDS.items():
            if not isinstance(fields.get(name), kind):
                raise FederationError(
                    f"not a message of this package (its {name} is no {kind.__name__})"
                )
        site = Site(fields["node_config"], fields["run_id"], fields["node_id"])
        connection.settimeout(None)
        send_frame(connection, {}, answer(fields["kind"], content, site))
    except (OSError, EOFError, FederationError) as error:
        logger.warning("a message was dropped: %s", error)
