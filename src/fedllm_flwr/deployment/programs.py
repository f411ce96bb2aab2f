"""Wrappers of Flower's programs for sites and servers; each changes one thing.

``flwr-clientapp``: Flower's own unpacks the bundle that a server has sent and imports the app that
it names, which may be code of the bundle. Here nothing is unpacked, and the app is the one that the
site's operator has installed.

``flower-superexec``: Flower's own writes the token by which an app acts for its run on the app's
command line, which every user of the machine can read. Here the app reads it from a file that
nobody else can open (``--token-file``).

``flower-supernode``: Flower's own gives its messages, on loopback, to whatever process of the
machine asks first. Here it gives them to the SuperExec that it has started, which has a secret.
"""

import atexit
import importlib
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from flwr.clientapp import ClientApp

_RUNTIME = "flwr.supernode.runtime.run_clientapp"
_EXECUTOR = "flwr.supercore.superexec.executor.subprocess_executor"
_SUPERNODE = "flwr.supernode.start_client_internal"
PROGRAMS = ("flower-superexec", "flwr-clientapp")  # that Flower's own processes start by name
_SECRET_BYTES = 32


def main() -> None:
    """Run the program of Flower that the first argument names, on the arguments after it."""
    program, sys.argv = sys.argv[1], sys.argv[1:]
    if program == "flwr-clientapp":
        from flwr.supernode.cli import flwr_clientapp

        confine(importlib.import_module(_RUNTIME))
        flwr_clientapp()
    elif program == "flower-superexec":
        from flwr.supercore.cli import flower_superexec

        hide_tokens(importlib.import_module(_EXECUTOR))
        flower_superexec()
    elif program == "flower-supernode":
        from flwr.supernode.cli import flower_supernode

        require_secret(importlib.import_module(_SUPERNODE))
        flower_supernode()
    else:
        sys.exit(f"error: {program}: choose from flower-supernode, {', '.join(PROGRAMS)}")


def confine(runtime: ModuleType) -> None:
    """Replace what unpacks and loads bundles in Flower's module `runtime`.

    Exits with a message if this version of Flower does it by other means.
    """
    otherwise = "code of a server cannot be kept away"
    _replace(runtime, "install_from_fab", lambda *_, **__: None, otherwise)
    _replace(runtime, "get_load_client_app_fn", _installed, otherwise)


def is_confined() -> bool:
    """Whether this process cannot import code of bundles."""
    runtime = sys.modules.get(_RUNTIME)
    return getattr(runtime, "get_load_client_app_fn", None) is _installed


def hide_tokens(executor: ModuleType) -> None:
    """Let Flower's module `executor` hand tokens to the processes that it starts by a file.

    Exits with a message if this version of Flower starts them by other means.
    """

    def start(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        at = command.index("--token")
        command, token = command[:at] + command[at + 2 :], command[at + 1]
        return _start_with_file(command, "--token-file", token, **options)

    unseen = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)
    _replace(executor, "subprocess", unseen, "a run's token cannot be kept off command lines")


def require_secret(supernode: ModuleType) -> None:
    """Let Flower's module `supernode` give messages to the SuperExec that it starts, and no other.

    Exits with a message if this version of Flower gives them by other means.
    """
    otherwise = "other users of this machine cannot be kept from a site's messages"
    secret = secrets.token_hex(_SECRET_BYTES)
    serve = getattr(supernode, "run_clientappio_api_grpc", None)

    def serve_with_secret(**options: Any) -> Any:
        assert serve is not None
        return serve(**{**options, "superexec_auth_secret": secret.encode()})

    def start(command: list[str]) -> "subprocess.Popen[bytes]":
        return _start_with_file(command, "--superexec-auth-secret-file", secret)

    _replace(supernode, "run_clientappio_api_grpc", serve_with_secret, otherwise)
    _replace(supernode, "subprocess", SimpleNamespace(Popen=start), otherwise)


def _replace(module: ModuleType, name: str, value: object, otherwise: str) -> None:
    if not hasattr(module, name):
        sys.exit(
            f"error: this version of Flower has no {name} in {module.__name__}, so {otherwise}; "
            "install the version that fedllm-flwr asks for"
        )
    setattr(module, name, value)


def _installed(*_: Any, **__: Any) -> Callable[..., ClientApp]:
    """In the place of finding the app that a bundle names."""

    def load(*_: Any) -> ClientApp:
        app: ClientApp = importlib.import_module("fedllm_flwr.client.app").app
        return app

    return load


def _start_with_file(
    command: list[str], option: str, secret: str, **options: Any
) -> "subprocess.Popen[bytes]":
    """Start a command that reads `secret` from the file of an option, which no other user can."""
    if hasattr(os, "memfd_create"):  # Linux: a file without a name, gone with its last reader
        descriptor = os.memfd_create("secret", 0)
        path = f"/proc/self/fd/{descriptor}"
    else:
        descriptor, path = tempfile.mkstemp(prefix="fedllm-secret-")
        atexit.register(Path(path).unlink, missing_ok=True)
    try:
        os.write(descriptor, secret.encode())
        return subprocess.Popen([*command, option, path], pass_fds=(descriptor,), **options)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    # Under its own name, so that `is_confined` of the app asks this very module.
    importlib.import_module("fedllm_flwr.deployment.programs").main()
