"""Commands of Flower on the SuperLink of a server's directory."""

import json
import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

from fedllm_flwr.deployment.directory import FLWR_HOME, absolute
from fedllm_flwr.errors import ConfigError

CONNECTION = "federation"  # name of the SuperLink connection in Flower's configuration


def server_folder(directory: str | Path) -> Path:
    """The path of a server's directory.

    Raises:
        ConfigError: no directory that `fedllm server init` has made.
    """
    folder = absolute(directory)
    if not (folder / FLWR_HOME / "config.toml").is_file():
        raise ConfigError(f"{folder}: no directory that `fedllm server init` has made")
    return folder


def flwr_command(*arguments: str) -> list[str]:
    """``flwr ...`` of this installation, on the connection of a server's directory."""
    return [str(Path(sys.executable).parent / "flwr"), *arguments, CONNECTION]


def flwr_environment(folder: Path) -> Mapping[str, str]:
    """In which `flwr` finds the connection of the server's directory `folder`."""
    config = tomllib.loads((folder / FLWR_HOME / "config.toml").read_text("utf-8"))
    host = config["superlink"][CONNECTION]["address"].rpartition(":")[0]
    unproxied = os.environ.get("no_proxy")
    return {
        **os.environ,
        "FLWR_HOME": str(folder / FLWR_HOME),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        "no_proxy": ",".join(filter(None, [host, unproxied])),
    }


def last_json(text: str) -> dict[str, object]:
    """The JSON object that a command of Flower prints last, whatever stands before it."""
    start = text.find("{")
    if start < 0:
        return {}
    try:
        answer = json.loads(text[start:])
    except json.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}
