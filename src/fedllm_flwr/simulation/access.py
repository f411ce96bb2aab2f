"""Access control of a run's Ray: by token and, if Ray is local, only from this machine.

By default Ray listens on all interfaces and executes any code that it is sent. Ray checks the token
in every call (``RAY_AUTH_MODE=token``,
https://docs.ray.io/en/latest/ray-security/token-auth.html).
"""

import contextlib
import importlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from fedllm_flwr.errors import FederationError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
# Whether Ray may span machines on any system. If not, all its processes bind 127.0.0.1.
SPANS_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
LOOPBACK = "127.0.0.1"
_TOKEN_BYTES = 32
_ANSWER_S = 15.0
_LONGEST_FOLDER = 24  # characters: a socket's path has at most 107, Ray adds about 80


@contextlib.contextmanager
def private_ray() -> Iterator[Path]:
    """Make the Ray started by this process listen only on loopback and require a new token.

    Yields:
        An empty folder for Ray's sockets and logs. Since Ray makes it writable for every user, its
        parent folder is private to this user; both are removed at the end.

    Raises:
        FederationError: this process has already loaded Ray without authentication.
    """
    wanted = {MODE: "token", TOKEN: secrets.token_hex(_TOKEN_BYTES), SPANS_MACHINES: "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    above = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    above = above if len(above) <= _LONGEST_FOLDER else "/tmp"  # a longer path is no valid socket
    folder = Path(tempfile.mkdtemp(prefix="fedllm-", dir=above))
    try:
        _take_up_token()
        yield folder / "ray"
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        shutil.rmtree(folder, ignore_errors=True)


def check_is_private(node_ip: str) -> None:
    """Reject a local Ray that other machines can reach.

    Raises:
        FederationError: its processes listen on an address other than loopback.
    """
    if node_ip != LOOPBACK:
        raise FederationError(
            f"Ray listens on {node_ip} and not only on this machine, because it was imported "
            f"before the run; set {SPANS_MACHINES}=0 before Python starts, or use "
            "federation.engine=inprocess."
        )


def use_cluster_token(address: str) -> None:
    """Let this process authenticate to a cluster with the token from Ray's standard locations.

    A value of ``RAY_AUTH_MODE`` that the user has set, including ``disabled``, takes precedence.

    Raises:
        FederationError: there is no token, or this process has loaded Ray without authentication.
    """
    if os.environ.setdefault(MODE, "token") != "token":
        return
    file = Path(os.environ.get(TOKEN_PATH) or "~/.ray/auth_token").expanduser()
    if not os.environ.get(TOKEN) and not file.is_file():
        raise FederationError(
            f"federation.ray_address={address}: no token for the cluster; put the one that it was "
            f"started with into {TOKEN} or {file}, or set {MODE}=disabled if it has none and "
            "nobody else can reach it."
        )
    _take_up_token()


def check_asks_for_token(address: str, channel: grpc.Channel) -> None:
    """Reject a cluster that answers without a token, unless the user has disabled tokens.

    Raises:
        FederationError: anyone who can reach the cluster can run code on it.
    """
    if os.environ.get(MODE, "token") != "token":
        return
    ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
    try:
        ask(b"", timeout=_ANSWER_S)
    except grpc.RpcError:
        return  # the cluster requires a token; other errors occur when Ray connects
    raise FederationError(
        f"federation.ray_address={address}: the cluster asks for no token, so whoever reaches it "
        f"can run code on it; start it with {MODE}=token, or set {MODE}=disabled here too."
    )


def _take_up_token() -> None:
    """Make Ray read the token from the environment; Ray reads the mode once, when imported."""
    if "ray" not in sys.modules:
        return
    raylet: Any = importlib.import_module("ray._raylet")
    if raylet.get_authentication_mode() != raylet.AuthenticationMode.TOKEN:
        raise FederationError(
            "Ray was imported before the run, without authentication; set RAY_AUTH_MODE=token "
            "before Python starts, or use federation.engine=inprocess."
        )
    raylet.AuthenticationTokenLoader.instance().reset_cache()
