"""The certificate authority of a federation, and the server certificates that it signs."""

import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm_flwr.config.names import shown
from fedllm_flwr.deployment.new_directory import PUBLIC, SECRET, absolute
from fedllm_flwr.errors import ConfigError

CA_DAYS, SERVER_DAYS = 3650, 730  # validity
LOOPBACK = ("localhost", "127.0.0.1")
_CLOCK_SKEW = timedelta(hours=1)  # backdating, so that a site with a slow clock accepts it
_LONGEST_COMMON_NAME = 64  # characters (RFC 5280, ub-common-name)
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


@dataclass(frozen=True)
class Issued:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """The content of ``*.crt``."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The content of ``*.key``, unencrypted: file permissions protect it."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def subject_alternative_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """The subject alternative names of a server certificate: `hosts`, then loopback.

    gRPC checks only these names, never the common name.

    Raises:
        ConfigError: one of `hosts` is neither a host name nor an IP address.
    """
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys([*hosts, *LOOPBACK]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            labels = host.split(".")
            # The last label of a host name is not a number: 10.0.0.300 is a mistyped address.
            if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
                raise ConfigError(
                    f"--host {shown(host)}: neither a host name nor an IP address; give what the "
                    "sites will dial, without scheme and port, as fl.example.org or 10.0.0.5"
                ) from None
            names.append(x509.DNSName(host))
    return names


def issue_ca() -> Issued:
    """A certificate authority that can sign server certificates, but no further authorities."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("fedllm federation CA")
    key_usage = _key_usage(key_cert_sign=True, crl_sign=True)
    builder = _builder(name, name, key, CA_DAYS).add_extension(key_usage, critical=True)
    constraints = x509.BasicConstraints(ca=True, path_length=0)
    return Issued(builder.add_extension(constraints, True).sign(key, hashes.SHA384()), key)


def issue_server(ca: Issued, hosts: Sequence[str]) -> Issued:
    """A server certificate for `hosts` and loopback; raises as `subject_alternative_names`."""
    key = ec.generate_private_key(ec.SECP384R1())
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    extended = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = _builder(_name(hosts[0]), ca.certificate.subject, key, SERVER_DAYS)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(extended, critical=False)
        .add_extension(issuer_id, critical=False)
        .add_extension(
            x509.SubjectAlternativeName(subject_alternative_names(hosts)), critical=False
        )
        .sign(ca.key, hashes.SHA384())
    )
    return Issued(certificate, key)


def fingerprint(pem: bytes) -> str:
    """SHA-256 of a certificate as ``openssl x509 -noout -fingerprint -sha256`` prints it."""
    digest = x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256())
    return digest.hex(":").upper()


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses in a server certificate."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    text = common_name[:_LONGEST_COMMON_NAME]
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _key_usage(**allowed: bool) -> x509.KeyUsage:
    usages = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{usage: allowed.get(usage, False) for usage in usages})


def read_ca(pem: bytes, source: str) -> x509.Certificate:
    """The certificate authority in a file from the server's operator.

    Raises:
        ConfigError: it is not a PEM certificate, not of an authority, or expired.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ConfigError(
            f"--ca {source}: no PEM certificate; give the ca.crt of the server's directory"
        ) from None
    try:
        is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_ca = False
    if not is_ca:
        raise ConfigError(
            f"--ca {source}: a certificate, but not that of an authority; give the ca.crt of the "
            "server's directory, not its server.crt"
        )
    if certificate.not_valid_after_utc < datetime.now(UTC):
        raise ConfigError(
            f"--ca {source}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; ask the "
            "server's operator for a new ca.crt"
        )
    return certificate


def renew_certificate(directory: str | Path, more_hosts: list[str]) -> list[str]:
    """Replace ``server.crt`` and ``server.key`` by new ones of the same certificate authority.

    The old files are kept as ``*.old``; the sites' ca.crt stays valid.

    Args:
        more_hosts: names and addresses to add to those of the old certificate.

    Returns:
        Lines for the operator.

    Raises:
        ConfigError: not a server directory with TLS, files do not match, the authority has expired,
            or a host is neither a name nor an address.
    """
    folder = absolute(directory)
    subject_alternative_names(more_hosts)  # checks them
    authority = _certificate(folder / "ca.crt")
    if authority.not_valid_after_utc < datetime.now(UTC):
        raise ConfigError(
            f"{folder / 'ca.crt'} {_expiry(authority)}: a new authority is needed, which every "
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
        authority.public_key()
    ):
        raise ConfigError(f"{file} is not the key of {folder / 'ca.crt'}; put that back")
    old = _certificate(folder / "server.crt")
    hosts = [*dict.fromkeys([*hosts_of(old), *more_hosts])]
    issued = issue_server(Issued(authority, key), hosts)
    _replace(folder / "server.crt", issued.certificate_pem, PUBLIC)
    _replace(folder / "server.key", issued.key_pem, SECRET)
    return [
        f"Made a new certificate for {', '.join(hosts)}, valid {SERVER_DAYS} days; the old one "
        f"{_expiry(old)} and is kept in {folder / 'server.crt.old'}.",
        "  restart    the SuperLink reads it when it starts; runs continue meanwhile",
        "  sites      nothing to do: the authority is the same",
    ]


def _certificate(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}; give a directory that `fedllm server init` has made"
        ) from None
    except ValueError:
        raise ConfigError(f"{file}: no PEM certificate; put the right file back") from None


def _expiry(certificate: x509.Certificate) -> str:
    end = certificate.not_valid_after_utc
    return f"{'ended' if end < datetime.now(UTC) else 'would end'} on {end:%Y-%m-%d}"


def _replace(file: Path, content: bytes, mode: int) -> None:
    """Replace `file` atomically; the old one is kept."""
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
