"""Wrappers of Flower's programs for sites and servers; each changes one behaviour.

``flwr-clientapp``: Flower's program unpacks the bundle from the server and imports the app that it
names, which may be code in the bundle. The wrapper unpacks nothing, and uses the app that the
site's operator has installed.

``flower-superexec``: Flower's program passes the token with which an app acts for its run on the
app's command line, which every user of the machine can read. With the wrapper, the app reads it
from a file that nobody else can open (``--token-file``).

``flower-supernode``: Flower's program gives its messages, on loopback, to any process of the
machine that asks first. The wrapper gives them only to its own SuperExec, which has a secret.
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
PROGRAMS = ("flower-superexec", "flwr-clientapp")  # started by name from Flower's processes
_SECRET_BYTES = 32


def main() -> None:
    """Run Flower's program named by the first argument, with the remaining arguments."""
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
    """Replace the functions of Flower's module `runtime` that unpack and load bundles.

    Exits with a message if this version of Flower works differently.
    """
    otherwise = "code of a server cannot be kept away"
    _replace(runtime, "install_from_fab", lambda *_, **__: None, otherwise)
    _replace(runtime, "get_load_client_app_fn", _installed, otherwise)


def is_confined() -> bool:
    """Whether this process cannot import code from bundles."""
    runtime = sys.modules.get(_RUNTIME)
    return getattr(runtime, "get_load_client_app_fn", None) is _installed


def hide_tokens(executor: ModuleType) -> None:
    """Make Flower's module `executor` pass tokens to its child processes in a file.

    Exits with a message if this version of Flower works differently.
    """

    def start(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        at = command.index("--token")
        command, token = command[:at] + command[at + 2 :], command[at + 1]
        return _start_with_file(command, "--token-file", token, **options)

    unseen = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)
    _replace(executor, "subprocess", unseen, "a run's token cannot be kept off command lines")


def require_secret(supernode: ModuleType) -> None:
    """Make Flower's module `supernode` give messages only to the SuperExec that it starts.

    Exits with a message if this version of Flower works differently.
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
    """Replacement of the function that finds the app of a bundle."""

    def load(*_: Any) -> ClientApp:
        app: ClientApp = importlib.import_module("fedllm_flwr.client.app").app
        return app

    return load


def _start_with_file(
    command: list[str], option: str, secret: str, **options: Any
) -> "subprocess.Popen[bytes]":
    """Start a command that reads `secret` from a file, given as an option, private to this user."""
    if hasattr(os, "memfd_create"):  # Linux: an anonymous file, freed with its last reader
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
    # Imported by name, so that `is_confined`, called by the app, uses this very module.
    importlib.import_module("fedllm_flwr.deployment.programs").main()
