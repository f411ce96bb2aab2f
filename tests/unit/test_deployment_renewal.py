"""A new server certificate, and sites that are let go."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedllm_flwr.commands import main as cli
from fedllm_flwr.deployment.certificates import hosts_of, issue_ca, renew_certificate
from fedllm_flwr.deployment.server_directory import init_server
from fedllm_flwr.deployment.site_keys import unregister_site
from fedllm_flwr.errors import ConfigError, FederationError

HOSTS = ["fl.example.org", "10.0.0.5", "localhost", "127.0.0.1"]


@pytest.fixture
def server(tmp_path: Path) -> Path:
    init_server(tmp_path / "server", HOSTS[:2], 9191)
    return tmp_path / "server"


def certificate(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def test_new_certificate_is_of_the_same_authority_and_for_the_same_hosts(server: Path) -> None:
    before, authority = certificate(server / "server.crt"), (server / "ca.crt").read_bytes()
    status = cli.main(["server", "renew", str(server), "--host", "fl2.example.org"])

    assert status == 0
    after = certificate(server / "server.crt")
    assert after.serial_number != before.serial_number
    assert sorted(hosts_of(after)) == sorted([*HOSTS, "fl2.example.org"])
    assert sorted(hosts_of(before)) == sorted(HOSTS)
    after.verify_directly_issued_by(certificate(server / "ca.crt"))
    assert (server / "ca.crt").read_bytes() == authority
    key = load_pem_private_key((server / "server.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.public_key() == after.public_key()
    for name in ("server.key", "server.key.old"):
        assert stat.S_IMODE((server / name).stat().st_mode) == 0o600
    assert certificate(server / "server.crt.old") == before
    days = (after.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)
    assert days == pytest.approx(730, abs=1)


def test_renewed_twice_keeps_the_last_but_one(server: Path) -> None:
    renew_certificate(server, [])
    between = certificate(server / "server.crt")
    renew_certificate(server, [])
    assert certificate(server / "server.crt.old") == between
    left = [file.name for file in server.iterdir() if file.name.startswith(".")]
    assert left == []


def test_what_cannot_be_renewed_is_refused_and_left(server: Path, tmp_path: Path) -> None:
    before = (server / "server.crt").read_bytes()
    with pytest.raises(ConfigError, match="neither a host name nor an IP address"):
        renew_certificate(server, ["10.0.0.300"])
    with pytest.raises(ConfigError, match="No such file or directory; give a directory that"):
        renew_certificate(tmp_path / "none", [])
    (server / "ca.key").write_bytes(issue_ca().key_pem)
    with pytest.raises(ConfigError, match=r"ca\.key is not the key of .*ca\.crt"):
        renew_certificate(server, [])
    (server / "ca.key").unlink()
    with pytest.raises(ConfigError, match=r"ca\.key: No such file or directory; put the auth"):
        renew_certificate(server, [])
    assert (server / "server.crt").read_bytes() == before


def test_site_that_is_not_registered_cannot_be_let_go(server: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ward: no site of this name; none is registered"):
        unregister_site(server, "ward")
    (server / "site-keys" / "ward.pub").write_text("key")
    with pytest.raises(ConfigError, match=r"wart: no site of this name; registered are ward"):
        unregister_site(server, "wart")
    with pytest.raises(ConfigError, match=r"ward\.node is missing, so the id of ward is not"):
        unregister_site(server, "ward")
    with pytest.raises(ConfigError, match="use letters, digits"):
        unregister_site(server, "../ward")
    with pytest.raises(ConfigError, match="no directory that `fedllm server init` has made"):
        unregister_site(tmp_path, "ward")


@pytest.mark.slow  # a command of Flower
def test_site_is_let_go_by_a_running_server_only(server: Path) -> None:
    (server / "site-keys" / "ward.pub").write_text("key")
    (server / "site-keys" / "ward.node").write_text("4711\n")
    with pytest.raises(FederationError, match=r"does not answer; start .*start\.sh first"):
        unregister_site(server, "ward")
    assert (server / "site-keys" / "ward.pub").is_file()
