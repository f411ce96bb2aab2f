"""Authentication keys of sites: creation, checks, registration and withdrawal."""

import base64
import contextlib
import hashlib
import shlex
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_public_key,
)

from fedllm_flwr.config.names import shown
from fedllm_flwr.deployment.flower import CONNECTION, ask_flower, server_folder
from fedllm_flwr.deployment.new_directory import absolute, check_name
from fedllm_flwr.errors import ConfigError, FederationError

SITE_KEYS = "site-keys"  # folder of the registered keys in a server's directory
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


def make_key_pair(name: str) -> tuple[bytes, bytes]:
    """Private and public key on P-384, as ``ssh-keygen -t ecdsa -b 384`` writes them.

    flower-supernode reads private keys only in the OpenSSH format: it rejects PKCS#8 and SEC1
    (flwr 1.31). `name` becomes the public key's comment.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return private, public + f" {name}\n".encode()


def key_fingerprint(public: bytes) -> str:
    """Fingerprint of an OpenSSH public key, as ``ssh-keygen -l`` prints it: SHA256:..."""
    digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def check_public_key(content: bytes, source: str) -> None:
    """Check that a site's key file can be registered.

    Raises:
        ConfigError: it is a private key, or not a public key of the right kind.
    """
    if b"PRIVATE KEY" in content:
        raise ConfigError(
            f"{source}: a private key, which stays at its site; register the file *.pub beside "
            "it, and let the site make a new pair if this one was sent"
        )
    try:
        key = load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise ConfigError(
            f"{source}: no ECDSA public key in the OpenSSH format; give the *.pub that "
            "`fedllm site init` or `ssh-keygen -t ecdsa -b 384` has made"
        )


def registered_sites(folder: Path) -> dict[int, str]:
    """Names of the sites that are registered at the server of `folder`, by node id.

    Empty if there are none, as at a server made with ``--insecure``.
    """
    sites: dict[int, str] = {}
    for key in sorted((folder / SITE_KEYS).glob("*.pub")):
        with contextlib.suppress(OSError, ValueError):  # registered by hand, without its id
            sites[int(_node_file(key).read_text("utf-8"))] = key.stem
    return sites


def registered_keys(folder: Path) -> dict[str, str]:
    """Public keys of the sites that are registered at the server of `folder`, by name.

    They are in the OpenSSH format, without a comment.
    """
    texts = {file.stem: file.read_text("utf-8") for file in (folder / SITE_KEYS).glob("*.pub")}
    return {name: " ".join(text.split()[:2]) for name, text in sorted(texts.items())}


def register_site(directory: str | Path, key_file: str | Path) -> list[str]:
    """Register a site's public key; wraps ``flwr supernode register``.

    Returns:
        Lines for the operator.

    Raises:
        ConfigError: not a server directory, not a public key, or the name has another key already.
        FederationError: the SuperLink does not answer, or rejects the key.
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
    answer, said = ask_flower(folder, "supernode", "register", str(key))
    if not answer.get("success"):
        said = str(answer.get("error-message") or said).strip()
        if "already in use" in said:
            raise FederationError(
                f"{key}: the SuperLink knows this key already; see `flwr supernode list "
                f"{CONNECTION} --verbose`. The key of a site that was unregistered cannot come "
                "back: let it make a new one"
            )
        raise _failed("register", folder, said)
    node_id = str(answer["node-id"])
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
        ConfigError: not a server directory, or no site has this name.
        FederationError: the SuperLink does not answer, or rejects the request.
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
        raise _failed("unregister", folder, said)
    kept.unlink()
    node.unlink()
    return [
        f"Unregistered {name} (node {node_id}): the server refuses it from now on, and a run goes "
        "on without it.",
        "  to return  it needs a new key: fedllm site init in a new directory, then register",
    ]


def _node_file(key: Path) -> Path:
    """File with a registered site's node id, which Flower shows only once."""
    return key.with_suffix(".node")


def _failed(command: str, folder: Path, said: str) -> FederationError:
    """Error from the output of Flower's command."""
    if "unavailable" in said.lower():
        return FederationError(
            f"the SuperLink of {folder} does not answer; start {folder}/start.sh first"
        )
    return FederationError(f"flwr supernode {command}: {said or 'no answer'}")
