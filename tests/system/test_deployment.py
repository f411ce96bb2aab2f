"""A federation as its operators start it: TLS, registered sites, real processes on loopback."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from deployments import Federation, command_of, make_site, rounds_of, running_federation
from fedllm_flwr.deployment.certificates import issue_ca
from fedllm_flwr.flower.names import is_http
from processes import named, relatives, started, wait_for

pytestmark = pytest.mark.slow

SITES = ("hospital-a", "hospital-b")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Server and two registered sites, started with the scripts of their directories."""
    root = tmp_path_factory.mktemp("federation")
    with running_federation(root, dict.fromkeys(SITES)) as running:
        yield running


def ends_with(site: Path, cwd: Path) -> tuple[int, str]:
    """Exit status and words of a SuperNode that may try twice."""
    with started(
        [str(site / "start-supernode.sh")], cwd, MAX_RETRIES="1", RESTARTS="0"
    ) as supernode:
        # Flower's own child ends when it sees this process gone, so first it has to be reaped.
        supernode.wait(timeout=180)
        _, said = supernode.communicate(timeout=60)
    return supernode.returncode, said


def test_both_sites_are_online(federation: Federation) -> None:
    assert wait_for(lambda: federation.nodes() == ["online", "online"], 180)


def test_other_machines_reach_the_fleet_api_only(federation: Federation) -> None:
    listening = {
        connection.laddr.port: connection.laddr.ip.removeprefix("::ffff:")
        for process in (federation.superlink(), *_supernodes(federation))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }

    of_the_server = 3 if is_http() else 4  # health checks included
    assert len(listening) == of_the_server + 2 * len(SITES)
    open_to_all = {port for port, address in listening.items() if address != "127.0.0.1"}
    assert open_to_all == {federation.ports["fleet"]}


def _supernodes(federation: Federation) -> list[psutil.Process]:
    found = relatives(federation.folder.parent)
    return [process for process in found if "flower-supernode" in command_of(process)]


def test_unknown_key_is_refused(federation: Federation, tmp_path: Path) -> None:
    site = make_site(tmp_path, "stranger", federation.ports["fleet"], federation.folder / "ca.crt")

    status, said = ends_with(site, tmp_path)
    assert status != 0
    why = "its key is not registered" if is_http() else "No SuperNode found with the given public"
    assert why in said


def test_server_of_another_authority_is_refused(federation: Federation, tmp_path: Path) -> None:
    (tmp_path / "other.crt").write_bytes(issue_ca().certificate_pem)
    site = make_site(tmp_path, "stranger", federation.ports["fleet"], tmp_path / "other.crt")

    status, said = ends_with(site, tmp_path)
    assert status != 0
    assert "CERTIFICATE_VERIFY_FAILED" in said


def test_plaintext_is_refused(federation: Federation, tmp_path: Path) -> None:
    site = make_site(tmp_path, "stranger", federation.ports["fleet"], None)

    status, said = ends_with(site, tmp_path)
    assert status != 0
    assert "Giving up reconnection after" in said
    assert "2 tries" in said


def test_key_is_registered_once(federation: Federation) -> None:
    key = federation.folder / "site-keys" / "hospital-a.pub"
    done = federation.run("fedllm", "server", "register", str(federation.folder), str(key))

    assert done.returncode == 1
    assert "the SuperLink knows this key already" in done.stderr
    assert len(federation.nodes()) == len(SITES)


def _overrides(output: Path, num_rounds: int) -> list[str]:
    """A short run of both sites."""
    return [
        "federation.engine=deployment federation.num_clients=2 federation.sample_clients=2",
        f"federation.num_rounds={num_rounds} federation.round_timeout_s=200",
        f"training.max_steps=1 evaluation.every=0 output_dir={output}",
    ]


def _server_run(
    federation: Federation, output: Path, num_rounds: int
) -> "subprocess.CompletedProcess[str]":
    """Submitted and followed to its end by `fedllm server run`."""
    overrides = " ".join(_overrides(output, num_rounds)).split()
    return federation.run("fedllm", "server", "run", str(federation.folder), *overrides)


def test_run_goes_on_when_the_superlink_is_killed(federation: Federation, tmp_path: Path) -> None:
    """It is started again, finds its state on disk, and every process finds it."""
    output = tmp_path / "run"
    with ThreadPoolExecutor(1) as pool:
        submitted = pool.submit(_server_run, federation, output, 3)
        assert wait_for(lambda: len(rounds_of(output)) > 1, 300)
        killed = federation.superlink()
        os.kill(killed.pid, signal.SIGKILL)
        assert wait_for(lambda: (output / "summary.json").exists(), 300), rounds_of(output)
    followed = submitted.result()
    assert followed.returncode == 0, followed.stdout + followed.stderr
    for line in ("Submitted as run", "rounds      3 x all 2 clients", "Finished in"):
        assert followed.stdout.count(line) == 1, followed.stdout
    assert [record["round"] for record in rounds_of(output)] == [0, 1, 2, 3]
    for record in rounds_of(output)[1:]:
        assert (sorted(record["clients"]), record["failures"]) == (list(SITES), {})
    assert federation.superlink().pid != killed.pid
    assert wait_for(lambda: federation.statuses()[0] == "finished:completed", 90)
    clients = (output / "clients.csv").read_text()
    assert all(name in clients for name in SITES)
    assert (output / "adapter" / "adapter_model.safetensors").is_file()


def test_killed_app_of_the_server_is_said_at_once_with_the_command_that_goes_on(
    federation: Federation, tmp_path: Path
) -> None:
    """Flower itself notices after a minute, and says nothing."""
    output = tmp_path / "run"
    with ThreadPoolExecutor(1) as pool:
        submitted = pool.submit(_server_run, federation, output, 3)
        assert wait_for(lambda: len(rounds_of(output)) > 1, 300)
        [app] = named(relatives(federation.folder.parent), "flwr-serverapp")
        app.kill()
        killed = time.monotonic()
        followed = submitted.result()
        seconds = time.monotonic() - killed

    said = followed.stderr.strip()
    assert (followed.returncode, seconds < 30) == (1, True), followed.stdout + said
    assert "was killed or has crashed without a word" in said
    advised = said.split("resume with: ")[1].split()
    assert advised == ["fedllm", "server", "run", str(federation.folder), f"resume={output}"]
    status = federation.run("fedllm", "status", str(output))
    assert " ".join(advised) in status.stdout

    done = federation.run(*advised)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["round"] for record in rounds_of(output)] == [0, 1, 2, 3]


def test_status_knows_sites_by_name(federation: Federation) -> None:
    online = f"2 online: {', '.join(SITES)}"
    assert wait_for(lambda: federation.nodes() == ["online", "online"], 180)
    assert online in federation.run("fedllm", "status", str(federation.folder)).stdout


def test_site_refuses_what_its_policy_forbids(federation: Federation, tmp_path: Path) -> None:
    """The policy is read for every task; the server's operator sees what was asked."""
    policy = federation.folder.parent / "hospital-b" / "policy.yaml"
    before = policy.read_text()
    policy.write_text(before.replace("max_lora_rank: 128", "max_lora_rank: 4"))
    try:
        done = _server_run(federation, tmp_path / "run", num_rounds=1)
    finally:
        policy.write_text(before)

    said = " ".join(done.stdout.split())
    assert done.returncode == 1
    assert "refuses lora.r=8: it is above its max_lora_rank (4)" in said, done.stdout + done.stderr
    assert str(policy.parent) not in said
    assert not (tmp_path / "run" / "adapter").exists()
