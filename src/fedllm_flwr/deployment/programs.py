"""Wrappers of Flower's programs for sites and servers; each changes one behaviour.

``flwr-clientapp``: Flower's program unpacks the bundle from the server and imports the app that it
names, which may be code in the bundle. The wrapper unpacks nothing, and uses the app that the
site's operator has installed.

``flower-superexec``: Flower's program passes the token with which an app acts for its run on the
app's command line, which every user of the machine can read. With the wrapper, the app reads it
from a file that nobody else can open (``--token-file``). The wrapper starts only server apps at a
server and only client apps at a site, where the newer Flower's program starts any kind of app.

``flower-supernode``: Flower's program gives its messages, on loopback, to any process of the
machine that asks first. The wrapper gives them only to its own SuperExec, which has a secret. It
answers every message with the client app, and speaks gRPC with its server.

All of them accept the options of Flower 1.31, and replace them with those of a newer version.
"""

import atexit
import importlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from flwr.clientapp import ClientApp

from fedllm_flwr.errors import FederationError
from fedllm_flwr.flower.fleet import connect_over_grpc
from fedllm_flwr.flower.names import NAMES, SEEN, find, is_http, is_seen, missing, version

PROGRAMS = ("flower-superexec", "flwr-clientapp")  # started by name from Flower's processes
CA_FILE = "ca.crt"  # in a server's directory, if it has TLS
_SERVER_APP, _CLIENT_APP = "serverapp", "clientapp"  # what a SuperExec starts
_SECRET_BYTES = 32


def main() -> None:
    """Run Flower's program named by the first argument, with the remaining arguments."""
    program, *options = sys.argv[1:]
    require_seen()
    try:
        starts = {
            "flwr-clientapp": _clientapp,
            "flower-superexec": _superexec,
            "flower-supernode": _supernode,
        }
        if program not in starts:
            sys.exit(f"error: {program}: choose from flower-supernode, {', '.join(PROGRAMS)}")
        starts[program](options)
    except FederationError as error:
        sys.exit(f"error: {program}: {error}")


def require_seen() -> None:
    """Exit with a message under a version of Flower in which these programs were not tested."""
    if not is_seen(version()):
        sys.exit(
            f"error: servers and sites are tested with Flower {' and '.join(SEEN)}, not with "
            f"{version()}; pip install 'flwr[simulation]=={SEEN[-1]}.*'"
        )


def _clientapp(options: Sequence[str]) -> None:
    confine(find("clientapp module"))
    _start("flwr-clientapp", find("clientapp"), options)


def _superexec(options: Sequence[str]) -> None:
    given = dict(_pairs(options))
    kind = given.get("--plugin-type", _CLIENT_APP)
    control = given.pop("--control-api-address", None)
    hide_tokens(find("executor module"))
    if is_http():
        task_type = find("TaskType")
        one = task_type.SERVER_APP if kind == _SERVER_APP else task_type.CLIENT_APP
        find("task plugin").supported_task_types = frozenset({one})
        given.pop("--plugin-type", None)
        if kind == _SERVER_APP:
            if control is None:
                sys.exit(
                    "error: this server's directory is of an earlier version of fedllm-flwr; make "
                    "a new one with `fedllm server init`, or continue with Flower 1.31"
                )
            given.pop("--appio-api-address", None)
            given["--runtime-api-address"] = control
            if Path(CA_FILE).is_file():
                given.pop("--insecure", None)
                given["--root-certificates"] = CA_FILE
    _start("flower-superexec", find("superexec"), _listed(given))


def _supernode(options: Sequence[str]) -> None:
    given = dict(_pairs(options))
    over_http = "--http" in given
    given.pop("--http", None)
    if is_http():
        require_secret_over_http(find("supernode api module"), find("supernode module"))
        answer_by_client_app(find("supernode module"))
        if not over_http:
            connect_over_grpc(find("fleet module"))
        address = given.pop("--clientappio-api-address", None) or "127.0.0.1:0"
        host, _, port = address.rpartition(":")
        given |= {"--host": host, "--port": port if port != "0" else str(_free_port(host))}
    elif over_http:
        sys.exit(f"error: --http: Flower {version()} speaks gRPC with its server; leave it out")
    else:
        require_secret(find("supernode module"))
    _start("flower-supernode", find("supernode"), _listed(given))


def _start(name: str, command: Callable[[], None], options: Sequence[str]) -> None:
    sys.argv = [name, *options]
    command()


def _pairs(options: Sequence[str]) -> list[tuple[str, str | None]]:
    """Options and their values; None for a switch."""
    found: list[tuple[str, str | None]] = []
    for text in options:
        if text.startswith("-"):
            name, equals, value = text.partition("=")
            found.append((name, value if equals else None))
        elif found and found[-1][1] is None:
            found[-1] = (found[-1][0], text)
        else:
            sys.exit(f"error: {text}: an option's name has to come first")
    return found


def _listed(options: dict[str, str | None]) -> list[str]:
    pairs = options.items()
    return [text for pair in pairs for text in pair if text is not None]


def _free_port(host: str) -> int:
    """A port for a SuperNode's own apps; the newer Flower does not choose one itself."""
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])


def confine(runtime: ModuleType) -> None:
    """Replace the functions of Flower's module `runtime` that unpack and load bundles.

    Exits with a message if this version of Flower works differently.
    """
    otherwise = "code of a server cannot be kept away"
    _replace(runtime, "install_from_fab", lambda *_, **__: None, otherwise)
    if hasattr(runtime, "install_app_dependencies"):  # which a bundle names
        _replace(runtime, "install_app_dependencies", lambda *_, **__: None, otherwise)
    _replace(runtime, "get_load_client_app_fn", _installed, otherwise)


def is_confined() -> bool:
    """Whether this process cannot import code from bundles."""
    runtime = sys.modules.get(NAMES["clientapp module"][SEEN[-1]])
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


def require_secret_over_http(api: ModuleType, supernode: ModuleType) -> None:
    """The same for a SuperNode whose apps reach it over HTTP; `api` makes what they reach."""
    otherwise = "other users of this machine cannot be kept from a site's messages"
    secret = secrets.token_hex(_SECRET_BYTES)
    create = getattr(api, "create_app", None)

    def create_with_secret(**options: Any) -> Any:
        assert create is not None
        return create(**{**options, "superexec_auth_secret": secret.encode()})

    def start(command: list[str]) -> "subprocess.Popen[bytes]":
        return _start_with_file(command, "--superexec-auth-secret-file", secret)

    _replace(api, "create_app", create_with_secret, otherwise)
    _replace(supernode, "subprocess", SimpleNamespace(Popen=start), otherwise)


def answer_by_client_app(supernode: ModuleType) -> None:
    """Let Flower's module `supernode` answer no message of a run by an agent's app.

    A bundle's code would run in it.
    """
    kinds = SimpleNamespace(AGENT_APP=object(), CLIENT_APP=find("TaskType").CLIENT_APP)
    _replace(supernode, "TaskType", kinds, "code of a server cannot be kept away")


def _replace(module: ModuleType, name: str, value: object, otherwise: str) -> None:
    if not hasattr(module, name):
        sys.exit(f"error: {otherwise}: {missing(f'{module.__name__}.{name}')}")
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
