"""The key pair by which a SuperNode proves to the SuperLink which site it is."""

import base64
import hashlib

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_public_key,
)

from fedllm_flwr.errors import ConfigError

_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


def make_key_pair(name: str) -> tuple[bytes, bytes]:
    """Private and public key on P-384, as ``ssh-keygen -t ecdsa -b 384`` writes them.

    flower-supernode reads private keys in the OpenSSH format only: PKCS#8 and SEC1 are refused
    (flwr 1.31). `name` becomes the public key's comment.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return private, public + f" {name}\n".encode()


def key_fingerprint(public: bytes) -> str:
    """Of a public key in the OpenSSH format, as ``ssh-keygen -l`` prints it: SHA256:..."""
    digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def check_public_key(content: bytes, source: str) -> None:
    """Check that a site's key file can be registered.

    Raises:
        ConfigError: a private key, or no public key of the right kind.
    """
    if b"PRIVATE KEY" in content:
        raise ConfigError(
            f"{source}: a private key, which stays at its site; register the file *.pub beside "
            "it, and let the site make a new pair if this one has travelled"
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
