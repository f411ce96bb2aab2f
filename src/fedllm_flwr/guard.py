"""A site's ``flwr-clientapp``: the installed package answers, whatever a run's bundle holds.

Flower's own unpacks the bundle that a server has sent and imports the app that it names, which may
be code of the bundle. A site's start script puts this program in its place: nothing of the bundle
is unpacked, and the app is the one that the site's operator has installed.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from flwr.clientapp import ClientApp


def main() -> None:
    """Run Flower's ``flwr-clientapp`` on the installed app."""
    from flwr.supernode.cli import flwr_clientapp

    confine(importlib.import_module("flwr.supernode.runtime.run_clientapp"))
    flwr_clientapp()


def confine(runtime: ModuleType) -> None:
    """Replace what unpacks and loads bundles in Flower's module `runtime`.

    Exits with a message if this version of Flower does it by other means.
    """
    replaced = {"install_from_fab": _leave_packed, "get_load_client_app_fn": _installed}
    if missing := [name for name in replaced if not hasattr(runtime, name)]:
        sys.exit(
            f"error: this version of Flower has no {missing[0]} in {runtime.__name__}, so code of "
            "a server cannot be kept away; install the version that fedllm-flwr asks for"
        )
    for name, function in replaced.items():
        setattr(runtime, name, function)


def _leave_packed(*_: Any, **__: Any) -> None:
    """In the place of unpacking a bundle."""


def _installed(*_: Any, **__: Any) -> Callable[..., ClientApp]:
    """In the place of finding the app that a bundle names."""

    def load(*_: Any) -> ClientApp:
        from fedllm_flwr.client_app import app

        return app

    return load


if __name__ == "__main__":
    main()
