"""Admit a site to the running SuperLink by its public key, and let it go again."""

import contextlib
import shlex
from pathlib import Path

from fedllm_flwr.config.names import shown
from fedllm_flwr.deployment.directory import absolute, check_name
from fedllm_flwr.deployment.flower import (
    CONNECTION,
    ask_flower,
    server_folder,
)
from fedllm_flwr.deployment.keys import check_public_key, key_fingerprint
from fedllm_flwr.deployment.server import SITE_KEYS
from fedllm_flwr.errors import ConfigError, FederationError

_NOT_THERE = "the SuperLink of {folder} does not answer; start {folder}/start.sh first"


def registered_sites(folder: Path) -> dict[int, str]:
    """Names of the sites that are registered at the server of `folder`, by node id.

    Empty without any, as at a server made with ``--insecure``.
    """
    sites: dict[int, str] = {}
    for key in sorted((folder / SITE_KEYS).glob("*.pub")):
        with contextlib.suppress(OSError, ValueError):  # registered by hand, without its id
            sites[int(_node_file(key).read_text("utf-8"))] = key.stem
    return sites


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
            f"{kept} holds another key of this name; let its site go first (fedllm server "
            f"unregister {shlex.quote(str(folder))} {key.stem}), or rename the new key's file"
        )
    alike = [file.stem for file in kept.parent.glob("*.pub") if file.stem != key.stem]
    for name in alike:
        if name.casefold() == key.stem.casefold():
            raise ConfigError(
                f"{key.stem}: differs from the registered {name} in capital letters only, and "
                "people would take one for the other; let the site choose another name"
            )
    node_id = _register(folder, key)
    if not kept.exists():
        kept.write_bytes(content)
    _node_file(kept).write_text(f"{node_id}\n")
    return [
        f"Registered {key.stem} as node {node_id}; its key is kept in {kept}.",
        f"  telephone  compare with its operator: {key_fingerprint(content)}",
    ]


def unregister_site(directory: str | Path, name: str) -> list[str]:
    """Unregister a site by its name; its key cannot be registered again (flwr 1.31).

    Returns:
        Lines for the operator.

    Raises:
        ConfigError: no server's directory, or no site of this name.
        FederationError: the SuperLink is not there, or refuses.
    """
    folder = server_folder(directory)
    check_name(name, "the site's name")
    kept = folder / SITE_KEYS / f"{name}.pub"
    if not kept.is_file():
        names = sorted(file.stem for file in (folder / SITE_KEYS).glob("*.pub"))
        known = f"registered are {', '.join(names)}" if names else "none is registered"
        raise ConfigError(f"{shown(name)}: no site of this name; {known}")
    node = _node_file(kept)
    try:
        node_id = node.read_text("utf-8").strip()
    except OSError:
        raise ConfigError(
            f"{node} is missing, so the id of {name} is not known: find it with `flwr supernode "
            f"list {CONNECTION}`, then `flwr supernode unregister <id> {CONNECTION}`"
        ) from None
    answer, said = ask_flower(folder, "supernode", "unregister", node_id)
    if not answer.get("success"):
        said = str(answer.get("error-message") or said).strip()
        if "unavailable" in said.lower():
            raise FederationError(_NOT_THERE.format(folder=folder))
        raise FederationError(f"flwr supernode unregister: {said or 'no answer'}")
    kept.unlink()
    node.unlink()
    return [
        f"Unregistered {name} (node {node_id}): the server refuses it from now on, and a run goes "
        "on without it.",
        "  to return  it needs a new key: fedllm site init in a new directory, then register",
    ]


def _node_file(key: Path) -> Path:
    """Where the id of a registered site's node is kept; Flower tells it only once."""
    return key.with_suffix(".node")


def _register(folder: Path, key: Path) -> str:
    """Id of the new node."""
    answer, said = ask_flower(folder, "supernode", "register", str(key))
    if answer.get("success"):
        return str(answer["node-id"])
    raise FederationError(_reason(folder, key, answer, said))


def _reason(folder: Path, key: Path, answer: dict[str, object], stderr: str) -> str:
    said = str(answer.get("error-message") or stderr).strip()
    if "unavailable" in said.lower():
        return _NOT_THERE.format(folder=folder)
    if "already in use" in said:
        return (
            f"{key}: the SuperLink knows this key already; see `flwr supernode list {CONNECTION} "
            "--verbose`. The key of a site that was unregistered cannot come back: let it make "
            "a new one"
        )
    return f"flwr supernode register: {said or 'no answer'}"
