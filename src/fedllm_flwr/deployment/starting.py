"""Starts a site's SuperNode with the options written by `fedllm site init`."""

import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from fedllm_flwr.deployment.flower import program_environment
from fedllm_flwr.deployment.new_directory import absolute
from fedllm_flwr.deployment.programs import PROGRAMS
from fedllm_flwr.errors import ConfigError

SUPERNODE = "supernode.toml"  # options of flower-supernode, one per line
_OPTIONS = (
    "superlink",
    "health-server-address",
    "insecure",
    "root-certificates",
    "auth-supernode-private-key",
)


def start_supernode(directory: str | Path, further: Sequence[str]) -> NoReturn:
    """Replace this process by the SuperNode of a site's directory.

    Args:
        further: options of ``flower-supernode``, which are added after the site's own.

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
    file = folder / SUPERNODE
    try:
        options = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no directory that `fedllm site init` has made") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); correct it") from None
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise ConfigError(f"{file}: unknown {unknown[0]}; it holds {', '.join(_OPTIONS)}")
    if "superlink" not in options:
        raise ConfigError(f"{file}: superlink is missing; give the server's host:port")
    for name in PROGRAMS:  # without the wrappers, Flower would run code that a server sends
        program = folder / "bin" / name
        executable = os.access(program, os.X_OK)
        if not (executable and "fedllm_flwr.deployment.programs" in program.read_text("utf-8")):
            raise ConfigError(
                f"{program}: not the program that keeps a server's code away; make this site's "
                "directory anew with `fedllm site init`, or copy bin/ from one made so"
            )
    environment = program_environment(folder, "127.0.0.1,localhost")
    # The programs of bin/ come before any others on the operator's path.
    path = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    environment["PATH"] = os.pathsep.join(path)
    command = [sys.executable, "-P", "-m", "fedllm_flwr.deployment.programs", "flower-supernode"]
    command += ["--node-config", "node.toml", "--clientappio-api-address", "127.0.0.1:0"]
    command += ["--max-retries", os.environ.get("MAX_RETRIES", "30")]
    for name, value in options.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [*command, *further], environment
