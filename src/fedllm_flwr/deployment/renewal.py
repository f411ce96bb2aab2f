"""A new server certificate of the same authority: sites keep the ca.crt they have."""

import os
import secrets
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedllm_flwr.deployment.certificates import (
    SERVER_DAYS,
    Issued,
    hosts_of,
    issue_server,
    subject_alternative_names,
)
from fedllm_flwr.deployment.directory import PUBLIC, SECRET, absolute
from fedllm_flwr.errors import ConfigError


def renew_certificate(directory: str | Path, more_hosts: list[str]) -> list[str]:
    """Replace ``server.crt`` and ``server.key``; the old ones stay beside them as ``*.old``.

    Args:
        more_hosts: names and addresses to add to those of the old certificate.

    Returns:
        Lines for the operator.

    Raises:
        ConfigError: no server's directory with TLS, files that do not fit each other, an authority
            that has ended, or a host that cannot be.
    """
    folder = absolute(directory)
    subject_alternative_names(more_hosts)  # checks them
    authority = _read_authority(folder)
    old = _certificate(folder / "server.crt")
    hosts = [*dict.fromkeys([*hosts_of(old), *more_hosts])]
    issued = issue_server(authority, hosts)
    _replace(folder / "server.crt", issued.certificate_pem, PUBLIC)
    _replace(folder / "server.key", issued.key_pem, SECRET)
    return [
        f"Made a new certificate for {', '.join(hosts)}, valid {SERVER_DAYS} days; the old one "
        f"{_ends(old)} and is kept in {folder / 'server.crt.old'}.",
        "  restart    the SuperLink reads it when it starts; a run goes on meanwhile",
        "  sites      nothing to do: the authority is the same",
    ]


def _ends(certificate: x509.Certificate) -> str:
    end = certificate.not_valid_after_utc
    return f"{'ended' if end < datetime.now(UTC) else 'would end'} on {end:%Y-%m-%d}"


def _read_authority(folder: Path) -> Issued:
    certificate = _certificate(folder / "ca.crt")
    if certificate.not_valid_after_utc < datetime.now(UTC):
        raise ConfigError(
            f"{folder / 'ca.crt'} {_ends(certificate)}: a new authority is needed, which every "
            "site has to be given; README.md there shows how"
        )
    file = folder / "ca.key"
    try:
        key = load_pem_private_key(file.read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; put the authority's key back") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{file}: no private key in the PEM format without a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != (
        certificate.public_key()
    ):
        raise ConfigError(f"{file} is not the key of {folder / 'ca.crt'}; put that back")
    return Issued(certificate, key)


def _certificate(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}; give a directory that `fedllm server init` has made"
        ) from None
    except ValueError:
        raise ConfigError(f"{file}: no PEM certificate; put the right file back") from None


def _replace(file: Path, content: bytes, mode: int) -> None:
    """Write beside it and rename, so that there is always a whole file; the old one is kept."""
    new = file.with_name(f".{file.name}.{secrets.token_hex(6)}")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode & SECRET)
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(descriptor, mode)
            stream.write(content)
        old = file.with_name(f"{file.name}.old")
        old.unlink(missing_ok=True)
        os.link(file, old)
        new.replace(file)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise ConfigError(f"{file}: cannot be replaced ({error.strerror or error})") from error
