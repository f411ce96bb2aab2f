"""A federation as its operators start it: TLS, registered sites, real processes on loopback."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedllm_flwr.data.sources import DEMO
from fedllm_flwr.deployment.certificates import issue_ca
from fedllm_flwr.deployment.server import init_server
from fedllm_flwr.deployment.site import SiteOptions, init_site
from processes import BIN, environment, nothing_left, relatives, started, wait_for

pytestmark = pytest.mark.slow

SITES = ("hospital-a", "hospital-b")
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Federation:
    """A running server and what its sites need to reach it."""

    folder: Path  # of the server
    ports: dict[str, int]
    run: Command  # a command of this federation, at the server

    def nodes(self) -> list[str]:
        """States of all SuperNodes that the server knows."""
        listed = self.run("flwr", "supernode", "list", "federation", "--format", "json").stdout
        return [node["status"] for node in json.loads(listed[listed.index("{") :])["nodes"]]

    def superlink(self) -> psutil.Process:
        [found] = [p for p in relatives(self.folder.parent) if "flower-superlink" in _command(p)]
        return found


def _command(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


def three_free_ports() -> int:
    """The first of three in a row."""
    for base in range(20_000, 60_000, 7):
        with ExitStack() as stack:
            try:
                for port in range(base, base + 3):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return base
    raise AssertionError("no three free ports in a row")


def make_site(folder: Path, name: str, port: int, ca: Path | None) -> Path:
    """Its directory, with every other record of the demo."""
    lines = (DEMO / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(lines[len(name) % 2 :: 2][:40]), "utf-8")
    options = SiteOptions(
        name,
        str(data),
        f"localhost:{port}",
        None if ca is None else str(ca),
        device="cpu",
        insecure=ca is None,
    )
    init_site(folder / name, options)
    return folder / name


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Server and two registered sites, started with the scripts of their directories."""
    root = tmp_path_factory.mktemp("federation")
    server, base = root / "server", three_free_ports()
    init_server(server, ["localhost"], base)

    def run(*command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            env=environment(root, FLWR_HOME=str(server / "flwr"), FLWR_TELEMETRY_ENABLED="0"),
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    ports = {"appio": base, "fleet": base + 1, "control": base + 2}
    with ExitStack() as stack:
        stack.enter_context(started([str(server / "start.sh")], root))
        assert wait_for(lambda: _listens(ports["fleet"]), 60)
        for name in SITES:
            site = make_site(root, name, ports["fleet"], server / "ca.crt")
            done = run("fedllm", "server", "register", str(server), str(site / f"{name}.pub"))
            assert f"Registered {name}" in done.stdout, done.stderr
            stack.enter_context(started([str(site / "start-supernode.sh")], root))
        yield Federation(server, ports, run)
        stack.close()
        assert nothing_left(root) == []


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def ends_with(site: Path, cwd: Path) -> tuple[int, str]:
    """Exit status and words of a SuperNode that may try twice."""
    with started([str(site / "start-supernode.sh")], cwd, MAX_RETRIES="1") as supernode:
        # Flower's own child ends when it sees this process gone, so first it has to be reaped.
        supernode.wait(timeout=60)
        _, said = supernode.communicate(timeout=30)
    return supernode.returncode, said


def test_both_sites_are_online(federation: Federation) -> None:
    assert wait_for(lambda: federation.nodes() == ["online", "online"], 60)


def test_other_machines_reach_the_fleet_api_only(federation: Federation) -> None:
    listening = {
        connection.laddr.port: connection.laddr.ip.removeprefix("::ffff:")
        for process in (federation.superlink(), *_supernodes(federation))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }

    assert len(listening) == 3 + len(SITES)
    open_to_all = {port for port, address in listening.items() if address != "127.0.0.1"}
    assert open_to_all == {federation.ports["fleet"]}


def _supernodes(federation: Federation) -> list[psutil.Process]:
    found = relatives(federation.folder.parent)
    return [process for process in found if "flower-supernode" in _command(process)]


def test_unknown_key_is_refused(federation: Federation, tmp_path: Path) -> None:
    site = make_site(tmp_path, "stranger", federation.ports["fleet"], federation.folder / "ca.crt")

    status, said = ends_with(site, tmp_path)
    assert status != 0
    assert "No SuperNode found with the given public key" in said


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


def _run_arguments(federation: Federation, output: Path, num_rounds: int) -> list[str]:
    """A short run of both sites."""
    overrides = (
        "federation.engine=deployment federation.num_clients=2 federation.sample_clients=2 "
        f"federation.num_rounds={num_rounds} federation.round_timeout_s=200 "
        f"training.max_steps=1 evaluation.every=0 output_dir={output}"
    )
    app = str(federation.folder / "app")
    return ["flwr", "run", app, "federation", "--run-config", f'overrides="{overrides}"']


def _statuses(federation: Federation) -> list[str]:
    """Of all runs, the newest first."""
    listed = federation.run("flwr", "list", "federation", "--format", "json").stdout
    return [run["status"] for run in json.loads(listed[listed.index("{") :])["runs"]]


def _rounds(output: Path) -> list[dict[str, Any]]:
    """What a run has recorded so far, from round 0."""
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def test_run_goes_on_when_the_superlink_is_killed(federation: Federation, tmp_path: Path) -> None:
    """It is started again, finds its state on disk, and every process finds it."""
    output = tmp_path / "run"
    submitted = federation.run(*_run_arguments(federation, output, num_rounds=3))
    assert submitted.returncode == 0, submitted.stderr

    assert wait_for(lambda: len(_rounds(output)) > 1, 200)
    killed = federation.superlink()
    os.kill(killed.pid, signal.SIGKILL)
    assert wait_for(lambda: (output / "summary.json").exists(), 300), _rounds(output)
    assert [record["round"] for record in _rounds(output)] == [0, 1, 2, 3]
    for record in _rounds(output)[1:]:
        assert (sorted(record["clients"]), record["failures"]) == (list(SITES), {})
    assert federation.superlink().pid != killed.pid
    assert wait_for(lambda: _statuses(federation)[0] == "finished:completed", 30)
    clients = (output / "clients.csv").read_text()
    assert all(name in clients for name in SITES)
    assert (output / "adapter" / "adapter_model.safetensors").is_file()


def test_site_refuses_what_its_policy_forbids(federation: Federation, tmp_path: Path) -> None:
    """The policy is read for every task; the server's operator sees what was asked."""
    policy = federation.folder.parent / "hospital-b" / "policy.yaml"
    before = policy.read_text()
    policy.write_text(before.replace("max_lora_rank: 128", "max_lora_rank: 4"))
    try:
        arguments = _run_arguments(federation, tmp_path / "run", num_rounds=1)
        done = federation.run(*arguments, "--stream")
    finally:
        policy.write_text(before)

    said = " ".join(done.stdout.split())
    assert "refuses lora.r=8: it is above its max_lora_rank (4)" in said, done.stdout + done.stderr
    assert str(policy.parent) not in said
    assert not (tmp_path / "run" / "adapter").exists()
