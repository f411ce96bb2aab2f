"""Links that are cut, certificates that end, sites that come back under another node id."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from breakable import Deployment, Run, deployed, listens
from processes import nothing_left, wait_for

pytestmark = pytest.mark.slow

TIMEOUT_S = 60


def long_run(federation: Deployment, name: str) -> Run:
    """A run that goes on until the federation ends; every site has a trainer when it begins."""
    first = federation.submit(federation.root / f"{name}-first", "federation.num_rounds=1")
    assert first.reaches(1, 400), first.said()
    run = federation.submit(
        federation.root / name,
        "algorithm=scaffold",
        "federation.num_rounds=500",
        f"federation.round_timeout_s={TIMEOUT_S}",
    )
    assert run.reaches(1, 400), run.said()
    return run


def test_site_without_a_key_comes_back_as_another_node(tmp_path: Path) -> None:
    """It is known by its name: its new node takes the place of the one that is gone."""
    with deployed(tmp_path, ["amber", "cedar"], insecure=True) as federation:
        run = long_run(federation, "run")
        now = run.last_round()
        federation.kill_site("cedar")
        federation.start_site("cedar")
        assert wait_for(lambda: bool(run.failures("cedar", now)), 240), run.records()[-1]
        failed = run.last_round()
        assert wait_for(lambda: run.takes_part("cedar", failed), 400), run.said()
        nodes = {line.split("SuperNode ID: ")[1] for line in ids(federation, "cedar")}
        assert len(nodes) == 2
        assert all("amber" in record["clients"] for record in run.records()[1:])
    assert nothing_left(tmp_path) == []


def ids(federation: Deployment, site: str) -> list[str]:
    """Lines of a site's log that name its node."""
    lines = federation.sites[site].said().splitlines()
    return [line for line in lines if "SuperNode ID: " in line]


@contextmanager
def far_away() -> Iterator[tuple[list[str], str, str]]:
    """A network namespace: command to enter it, this side's address, and this side's link."""
    name = f"fl{os.getpid() % 100_000}"
    subnet = f"10.231.{os.getpid() % 250}"

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip")
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace here: {error.stderr.strip()}")
    try:
        ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        ip("address", "add", f"{subnet}.1/24", "dev", f"{name}a")
        ip("link", "set", f"{name}a", "up")
        inside = ["netns", "exec", name, "ip"]
        ip(*inside, "address", "add", f"{subnet}.2/24", "dev", f"{name}b")
        ip(*inside, "link", "set", f"{name}b", "up")
        ip(*inside, "link", "set", "lo", "up")
        yield ["ip", "netns", "exec", name], f"{subnet}.1", f"{name}a"
    finally:
        ip("netns", "delete", name)


@contextmanager
def cut(link: str) -> Iterator[None]:
    """The link is down meanwhile."""
    subprocess.run(["ip", "link", "set", link, "down"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "set", link, "up"], check=True)


def test_link_that_is_cut_heals_by_itself(tmp_path: Path) -> None:
    """For 15 s it is not noticed; for 100 s the rounds close without the site until it is back.

    gRPC gives up a connection whose bytes have not been acknowledged for 20 s, and with it a
    message that was on its way, which Flower does not send again.
    """
    with far_away() as (enter, address, link):
        federation = Deployment(tmp_path, host=address)
        try:
            federation.start_server()
            federation.add_site("amber", dial="localhost")
            federation.start_site("amber")
            federation.add_site("cedar", first=20)
            supernode = federation.start_site("cedar", prefix=enter)
            run = long_run(federation, "run")

            now = run.last_round()
            with cut(link):
                wait_for(lambda: False, 15)
            healed = run.last_round()
            assert wait_for(lambda: run.takes_part("cedar", healed), 240), run.said()
            assert run.failures("cedar", now) == []

            now = run.last_round()
            with cut(link):
                wait_for(lambda: False, 100)
                assert run.failures("cedar", now)
            healed = run.last_round()
            assert wait_for(lambda: run.takes_part("cedar", healed), 240), run.said()
            assert all("amber" in record["clients"] for record in run.records()[1:])
            assert supernode.process.poll() is None
            assert len(ids(federation, "cedar")) == 1  # the same process, never started again
        finally:
            federation.close()
    assert nothing_left(tmp_path) == []


def expire(server: Path) -> None:
    """Replace the server's certificate by one of yesterday, of the same authority and key."""
    old = x509.load_pem_x509_certificate((server / "server.crt").read_bytes())
    ca_key = load_pem_private_key((server / "ca.key").read_bytes(), None)
    yesterday = datetime.now(UTC) - timedelta(days=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(yesterday - timedelta(days=1))
        .not_valid_after(yesterday)
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    expired = builder.sign(ca_key, hashes.SHA384())  # type: ignore[arg-type]
    (server / "server.crt").write_bytes(expired.public_bytes(Encoding.PEM))


def test_expired_certificate_is_refused_until_it_is_renewed(tmp_path: Path) -> None:
    federation = Deployment(tmp_path)
    script = [str(federation.folder / "start-superlink.sh")]

    def superlink() -> None:
        if federation.server is not None:
            federation.server.process.terminate()
            federation.server.process.wait()
        federation.server = federation.started(script, "server")
        assert wait_for(lambda: listens(federation.fleet_port), 120)

    try:
        superlink()
        federation.add_site("amber")
        expire(federation.folder)
        superlink()
        site = federation.start_site("amber", MAX_RETRIES="1", RESTARTS="0")
        assert site.process.wait(120) != 0
        assert "CERTIFICATE_VERIFY_FAILED: certificate has expired" in site.said()
        assert "start-supernode.sh: the SuperNode ended with status" in site.said()

        renewed = federation.run_command("fedllm", "server", "renew", str(federation.folder))
        assert renewed.returncode == 0, renewed.stderr
        assert "the old one ended on" in renewed.stdout
        superlink()
        site = federation.start_site("amber")
        assert wait_for(lambda: "SuperNode ID: " in site.said(), 120), site.said()
    finally:
        federation.close()
    assert nothing_left(tmp_path) == []
