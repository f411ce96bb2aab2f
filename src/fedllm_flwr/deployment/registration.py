"""Admit a site: hand its public key to the running SuperLink, and keep a copy."""

import subprocess
from pathlib import Path

from fedllm_flwr.deployment.directory import absolute, check_name
from fedllm_flwr.deployment.flower import (
    CONNECTION,
    flwr_command,
    flwr_environment,
    last_json,
    server_folder,
)
from fedllm_flwr.deployment.keys import check_public_key
from fedllm_flwr.deployment.server import SITE_KEYS
from fedllm_flwr.errors import ConfigError, FederationError

_LIMIT_S = 60.0  # for flwr supernode register


def register_site(directory: str | Path, key_file: str | Path) -> list[str]:
    """Register a site's public key; wraps ``flwr supernode register``.

    Returns:
        Lines for the operator.

    Raises:
        ConfigError: no server's directory, no public key, or another key under the same name.
        FederationError: the SuperLink is not there, or refuses the key.
    """
    folder, key = server_folder(directory), absolute(key_file)
    try:
        content = key.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: {error.strerror}; give a site's *.pub") from None
    check_public_key(content, str(key))
    check_name(key.stem, "the key's file name")
    kept = folder / SITE_KEYS / f"{key.stem}.pub"
    if kept.exists() and kept.read_bytes() != content:
        raise ConfigError(
            f"{kept} holds another key of this name; remove it and unregister its site with "
            "`flwr supernode unregister`, or rename the new key's file"
        )
    node_id = _register(folder, key)
    if not kept.exists():
        kept.write_bytes(content)
    return [f"Registered {key.stem} as node {node_id}; its key is kept in {kept}."]


def _register(folder: Path, key: Path) -> str:
    """Id of the new node."""
    command = [*flwr_command("supernode", "register", str(key)), "--format", "json"]
    try:
        done = subprocess.run(
            command,
            env=flwr_environment(folder),
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FederationError("the SuperLink does not answer; look at its log") from None
    answer = last_json(done.stdout)
    if done.returncode == 0 and answer.get("success"):
        return str(answer["node-id"])
    raise FederationError(_reason(folder, key, answer, done.stderr))


def _reason(folder: Path, key: Path, answer: dict[str, object], stderr: str) -> str:
    said = str(answer.get("error-message") or stderr).strip()
    if "unavailable" in said.lower():
        return f"the SuperLink of {folder} does not answer; start {folder}/start.sh first"
    if "already in use" in said:
        return (
            f"{key}: the SuperLink knows this key already; see `flwr supernode list {CONNECTION} "
            "--verbose`. The key of a site that was unregistered cannot come back: let it make "
            "a new one"
        )
    return f"flwr supernode register: {said or 'no answer'}"
