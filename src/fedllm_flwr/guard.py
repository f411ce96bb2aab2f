"""Flower's programs as a site and a server run them: no code of a bundle, no token in sight.

``flwr-clientapp``: Flower's own unpacks the bundle that a server has sent and imports the app that
it names, which may be code of the bundle. Here nothing is unpacked, and the app is the one that the
site's operator has installed.

``flower-superexec``: Flower's own writes the token by which an app acts for its run on the app's
command line, which every user of the machine can read. Here the app reads it from a file that
nobody else can open (``--token-file``).
"""

import atexit
import importlib
import os
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
PROGRAMS = ("flower-superexec", "flwr-clientapp")


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
    else:
        sys.exit(f"error: {program}: choose from {', '.join(PROGRAMS)}")


def confine(runtime: ModuleType) -> None:
    """Replace what unpacks and loads bundles in Flower's module `runtime`.

    Exits with a message if this version of Flower does it by other means.
    """
    replaced = {"install_from_fab": _leave_packed, "get_load_client_app_fn": _installed}
    for name, function in replaced.items():
        _replace(runtime, name, function, "code of a server cannot be kept away")


def is_confined() -> bool:
    """Whether this process keeps the code of bundles away."""
    runtime = sys.modules.get(_RUNTIME)
    return getattr(runtime, "get_load_client_app_fn", None) is _installed


def hide_tokens(executor: ModuleType) -> None:
    """Let Flower's module `executor` hand tokens to the processes that it starts by a file.

    Exits with a message if this version of Flower starts them by other means.
    """
    shown = SimpleNamespace(Popen=_start_unseen, DEVNULL=subprocess.DEVNULL)
    _replace(executor, "subprocess", shown, "a run's token cannot be kept off command lines")


def _replace(module: ModuleType, name: str, value: object, otherwise: str) -> None:
    if not hasattr(module, name):
        sys.exit(
            f"error: this version of Flower has no {name} in {module.__name__}, so {otherwise}; "
            "install the version that fedllm-flwr asks for"
        )
    setattr(module, name, value)


def _leave_packed(*_: Any, **__: Any) -> None:
    """In the place of unpacking a bundle."""


def _installed(*_: Any, **__: Any) -> Callable[..., ClientApp]:
    """In the place of finding the app that a bundle names."""

    def load(*_: Any) -> ClientApp:
        app: ClientApp = importlib.import_module("fedllm_flwr.client_app").app
        return app

    return load


def _start_unseen(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
    """`subprocess.Popen` of a command with ``--token TOKEN``, which becomes ``--token-file``."""
    at = command.index("--token")
    token = command[at + 1]
    if hasattr(os, "memfd_create"):  # Linux: a file without a name, gone with its last reader
        descriptor = os.memfd_create("token", 0)
        path = f"/proc/self/fd/{descriptor}"
    else:
        descriptor, path = tempfile.mkstemp(prefix="fedllm-token-")
        atexit.register(Path(path).unlink, missing_ok=True)
    try:
        os.write(descriptor, token.encode())
        command = [*command[:at], "--token-file", path, *command[at + 2 :]]
        return subprocess.Popen(command, pass_fds=(descriptor,), **options)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    # Under its own name, so that `is_confined` of the app asks this very module.
    importlib.import_module("fedllm_flwr.guard").main()
