"""Start of a site's SuperNode: Flower's program, guarded, as `site init` has written it down."""

import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from fedllm_flwr.deployment.directory import FLWR_HOME, absolute
from fedllm_flwr.deployment.programs import PROGRAMS
from fedllm_flwr.errors import ConfigError

SUPERNODE = "supernode.toml"  # options of flower-supernode, one a line
_OPTIONS = (
    "superlink",
    "health-server-address",
    "insecure",
    "root-certificates",
    "auth-supernode-private-key",
)


def start_supernode(directory: str | Path, further: Sequence[str]) -> NoReturn:
    """Become the SuperNode of a site's directory.

    Args:
        further: options of ``flower-supernode``, which come after the site's own.

    Raises:
        ConfigError: `fedllm site init` has not made this directory, or part of it is gone.
    """
    folder = absolute(directory)
    command, environment = supernode_command(folder, further)
    os.umask(0o077)
    os.chdir(folder)
    os.execve(command[0], command, environment)


def supernode_command(
    folder: Path, further: Sequence[str] = ()
) -> tuple[list[str], Mapping[str, str]]:
    """The command line of a site's SuperNode, to be run in `folder`, and its environment.

    Raises:
        ConfigError: `fedllm site init` has not made this directory, or part of it is gone.
    """
    options = _options(folder)
    _check_guard(folder)
    programs = Path(sys.executable).parent
    unproxied = os.environ.get("no_proxy")
    environment = {
        **os.environ,
        # The guard's programs come first, whatever is on the operator's own path.
        "PATH": os.pathsep.join([str(folder / "bin"), str(programs), os.environ.get("PATH", "")]),
        "FLWR_HOME": str(folder / FLWR_HOME),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        # gRPC would ask a proxy even for this machine's own address.
        "no_proxy": ",".join(filter(None, ["127.0.0.1,localhost", unproxied])),
    }
    arguments = ["--node-config", "node.toml", "--clientappio-api-address", "127.0.0.1:0"]
    arguments += ["--max-retries", os.environ.get("MAX_RETRIES", "30")]
    for name, value in options.items():
        arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    program = [sys.executable, "-P", "-m", "fedllm_flwr.deployment.programs", "flower-supernode"]
    return [*program, *arguments, *further], environment


def _options(folder: Path) -> dict[str, str | bool]:
    file = folder / SUPERNODE
    try:
        options = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no directory that `fedllm site init` has made") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); mend it") from None
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise ConfigError(f"{file}: unknown {unknown[0]}; it holds {', '.join(_OPTIONS)}")
    if "superlink" not in options:
        raise ConfigError(f"{file}: superlink is missing; give the server's host:port")
    return options


def _check_guard(folder: Path) -> None:
    """Without its programs Flower's own would be found, and run code that a server sends."""
    for name in PROGRAMS:
        program = folder / "bin" / name
        executable = os.access(program, os.X_OK)
        if not (executable and "fedllm_flwr.deployment.programs" in program.read_text("utf-8")):
            raise ConfigError(
                f"{program}: not the program that keeps a server's code away; make this site's "
                "directory anew with `fedllm site init`, or copy bin/ from one made so"
            )
