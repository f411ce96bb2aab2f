"""Keys of a run: each site's X25519 key, signed with the site's identity key.

X25519, HKDF-SHA256 and ECDSA come from ``cryptography`` (OpenSSL) and are as constant-time as it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedllm_flwr.errors import FederationError

_PURPOSE = "fedllm-flwr secure aggregation 1"


@dataclass(frozen=True)
class KeyCard:
    """A site's signed public keys, which it shows to the other sites of a run.

    Args:
        identity: the site's public identity key, in the OpenSSH format.
        public: the run's X25519 key, in hexadecimal.
        signature: signature of run, name and ``public`` with the identity key, in hexadecimal.
    """

    identity: str
    public: str
    signature: str

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "KeyCard":
        """The card in a message.

        Raises:
            FederationError: it is not a key card.
        """
        try:
            card = cls(**json.loads(text))
        except (ValueError, TypeError):
            card = None
        if card is None or not all(isinstance(value, str) for value in asdict(card).values()):
            raise refused("a key card that is none")
        return card


def new_identity() -> bytes:
    """A private P-384 key in the OpenSSH format, as sites have."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def new_run_key() -> bytes:
    """A private X25519 key, 32 bytes."""
    return X25519PrivateKey.generate().private_bytes_raw()


def make_card(identity: bytes, private: bytes, run: str, name: str) -> KeyCard:
    """The card of a site for a run.

    Raises:
        FederationError: the identity is not an ECDSA key.
    """
    signer = _signer(identity)
    public = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()
    known_by = signer.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    signature = sign(identity, "run key", run, name, public)
    return KeyCard(known_by, public, signature.hex())


def sign(identity: bytes, *parts: str) -> bytes:
    """A signature of `parts` with a site's identity key.

    Raises:
        FederationError: the identity is not an ECDSA key.
    """
    return _signer(identity).sign(_text(*parts), ec.ECDSA(hashes.SHA256()))


def has_signed(card: KeyCard, signature: bytes, *parts: str) -> bool:
    """Whether the identity key of `card` has signed `parts`."""
    try:
        key = load_ssh_public_key(card.identity.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(signature, _text(*parts), ec.ECDSA(hashes.SHA256()))
    except (ValueError, UnsupportedAlgorithm, InvalidSignature):
        return False
    return True


def check_card(card: KeyCard, run: str, name: str) -> None:
    """Check that a card's identity key has signed its X25519 key for this run and name.

    Raises:
        FederationError: the signature is invalid.
    """
    try:
        signature = bytes.fromhex(card.signature)
        X25519PublicKey.from_public_bytes(bytes.fromhex(card.public))
    except ValueError:
        signature = b""
    if not has_signed(card, signature, "run key", run, name, card.public):
        raise refused(f"the key of {name}, which its own key has not signed for this run")


def check_known(cards: Mapping[str, KeyCard], known: Mapping[str, str]) -> dict[str, str]:
    """The known identities by name, extended by these cards; each name keeps its first identity.

    Raises:
        FederationError: a name has another identity than before, or two names share one.
    """
    after = dict(known)
    for name, card in sorted(cards.items()):
        if after.setdefault(name, card.identity) != card.identity:
            raise refused(
                f"another key of {name} than before; let the operators compare fingerprints, then "
                "remove it from secure/known-sites.json of this site's state"
            )
    if len({after[name] for name in cards}) < len(cards):
        raise refused("one key under two names")
    return after


def pair_secret(private: bytes, card: KeyCard) -> bytes:
    """The shared secret of two sites in a run, 32 bytes.

    Raises:
        FederationError: the other key has small order.
    """
    try:
        other = X25519PublicKey.from_public_bytes(bytes.fromhex(card.public))
        return X25519PrivateKey.from_private_bytes(private).exchange(other)
    except ValueError:
        raise refused("a key that shares no secret") from None


def derive(secret: bytes, *parts: str) -> bytes:
    """A 32-byte key derived from a secret by HKDF-SHA256, for the purpose named by `parts`."""
    return HKDF(hashes.SHA256(), 32, None, _text(*parts)).derive(secret)


def _text(*parts: str) -> bytes:
    return json.dumps([_PURPOSE, *parts]).encode()


def _signer(identity: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        signer = load_ssh_private_key(identity, None)
    except (ValueError, UnsupportedAlgorithm):
        signer = None
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise refused("a site's own key that is no ECDSA key in the OpenSSH format")
    return signer


def refused(what: str) -> FederationError:
    """A site's refusal, for its log and for the server."""
    text = f"secure aggregation: the site refuses {what}"
    return FederationError(text, text)
