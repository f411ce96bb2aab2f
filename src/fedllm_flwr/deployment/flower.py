"""Runs Flower's commands against the SuperLink of a server's directory."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from fedllm_flwr.deployment.new_directory import FLWR_HOME, absolute
from fedllm_flwr.errors import ConfigError, FederationError

CONNECTION = "federation"  # name of the SuperLink connection in Flower's configuration
DRY_RUN = "dry-run"  # key of a run's configuration: "yes" asks the sites and trains nothing
_LIMIT_S = 180.0  # for an answer


def is_server(folder: Path) -> bool:
    """Whether this directory was made by `fedllm server init`."""
    return (folder / FLWR_HOME / "config.toml").is_file()


def server_folder(directory: str | Path) -> Path:
    """The path of a server's directory.

    Raises:
        ConfigError: it was not made by `fedllm server init`.
    """
    folder = absolute(directory)
    if not is_server(folder):
        raise ConfigError(f"{folder}: no directory that `fedllm server init` has made")
    return folder


def flwr_command(*arguments: str) -> list[str]:
    """``flwr ...`` of this installation, on the connection of a server's directory."""
    return [str(Path(sys.executable).parent / "flwr"), *arguments, CONNECTION]


def flwr_environment(folder: Path) -> dict[str, str]:
    """Environment in which `flwr` finds the connection of the server's directory `folder`."""
    config = tomllib.loads((folder / FLWR_HOME / "config.toml").read_text("utf-8"))
    return program_environment(
        folder, config["superlink"][CONNECTION]["address"].rpartition(":")[0]
    )


def program_environment(folder: Path, unproxied: str) -> dict[str, str]:
    """Environment for a program of Flower that keeps its files in an operator's directory.

    Args:
        unproxied: hosts that gRPC reaches without a proxy, which it would use even for loopback.
    """
    return {
        **os.environ,
        "FLWR_HOME": str(folder / FLWR_HOME),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        "no_proxy": ",".join(filter(None, [unproxied, os.environ.get("no_proxy")])),
    }


def ask_flower(folder: Path, *command: str) -> tuple[dict[str, object], str]:
    """Run ``flwr <command>`` for the server of `folder`; return its JSON object and its text.

    Raises:
        FederationError: no answer in time.
    """
    try:
        done = subprocess.run(
            [*flwr_command(*command), "--format", "json"],
            env=flwr_environment(folder),
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FederationError("the SuperLink does not answer; check its log") from None
    return last_json(done.stdout), done.stderr


def last_json(text: str) -> dict[str, object]:
    """The last JSON object that a command of Flower prints."""
    brace, rest = text.partition("{")[1:]
    try:
        answer: dict[str, object] = json.loads(brace + rest)
    except json.JSONDecodeError:
        return {}
    return answer
