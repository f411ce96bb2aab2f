"""A federation as its operators start it, on loopback: processes to hurt, and what they say."""

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from deployments import SMALL
from fedllm_flwr.data.sources import DEMO
from fedllm_flwr.deployment.server_directory import init_server
from fedllm_flwr.deployment.site_directory import SiteOptions, init_site
from processes import BIN, environment, free_ports, relatives, wait_for

SITE = "FEDLLM_TEST_SITE"  # every process of a site carries its name
QUICK = ("training.max_steps=1", "training.batch_size=2", "evaluation.central=false")


def listens(port: int) -> bool:
    """Whether a process of this machine accepts connections."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def command_line(process: psutil.Process) -> str:
    """What a process was started as; "" if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def write_records(file: Path, first: int, count: int = 12) -> None:
    """Some records of the demo."""
    lines = (DEMO / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[first : first + count]), "utf-8")


@dataclass
class Started:
    """A process whose output goes into a file, as pipes that nobody reads would stop it."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        """All it has printed so far."""
        return self.log.read_text("utf-8", errors="replace")


@dataclass
class Run:
    """A submitted run, and the stream of its log."""

    output: Path
    stream: Started

    def records(self) -> list[dict[str, Any]]:
        """What it has recorded so far, from round 0."""
        file = self.output / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]

    def said(self) -> str:
        """Its log on one line, without Flower's colours."""
        return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", self.stream.said()).split())

    def last_round(self) -> int:
        """The newest recorded round; -1 before the first."""
        return max((record["round"] for record in self.records()), default=-1)

    def reaches(self, server_round: int, within_s: float = 240) -> bool:
        """Whether a round is recorded in time."""
        return wait_for(lambda: self.last_round() >= server_round, within_s)

    def failures(self, name: str, after: int) -> list[str]:
        """Why a site has failed in rounds later than `after`."""
        recorded = (record for record in self.records() if record["round"] > after)
        return [record["failures"][name] for record in recorded if name in record["failures"]]

    def takes_part(self, name: str, after: int) -> bool:
        """Whether a site has given a usable reply in a round later than `after`."""
        return any(
            name in record.get("clients", {})
            for record in self.records()
            if record["round"] > after
        )


@dataclass
class Deployment:
    """A server's directory and its sites below `root`; start and end them one by one."""

    root: Path
    insecure: bool = False
    host: str = "localhost"
    sites: dict[str, Started] = field(default_factory=dict)
    server: Started | None = None

    def __post_init__(self) -> None:
        self.base = free_ports(5)
        self.folder = self.root / "server"
        init_server(self.folder, [self.host], self.base, self.insecure)
        self._stack = ExitStack()
        self._number = 0

    @property
    def fleet_port(self) -> int:
        return self.base + 1

    def started(self, command: Sequence[str], name: str, **more: str) -> Started:
        """A command in a session of its own; its output is appended to ``<name>.log``."""
        log = self.root / f"{name}.log"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self.environment(**more),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self._stack.callback(process.wait)
        return Started(process, log)

    def environment(self, **more: str) -> dict[str, str]:
        """Of every process."""
        own = {"FLWR_HOME": str(self.folder / "flwr"), "FLWR_TELEMETRY_ENABLED": "0"}
        return environment(self.root, **{**own, "FLWR_DISABLE_UPDATE_CHECK": "1", **more})

    def run_command(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """A command at the server, to its end."""
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            env=self.environment(),
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def start_server(self) -> None:
        """Both of its processes."""
        self.server = self.started([str(self.folder / "start.sh")], "server")
        assert wait_for(lambda: listens(self.fleet_port), 180), self.server.said()

    def add_site(self, name: str, first: int = 0, dial: str | None = None) -> Path:
        """A site's directory, registered; the server runs already, if sites are registered."""
        data = self.root / f"{name}.jsonl"
        write_records(data, first)
        ca = None if self.insecure else str(self.folder / "ca.crt")
        address = f"{dial or self.host}:{self.fleet_port}"
        options = SiteOptions(
            name,
            str(data),
            address,
            ca,
            device="cpu",
            insecure=self.insecure,
            approval="automatic",
            policy=SMALL,
        )
        init_site(self.root / name, options)
        if not self.insecure:
            key = str(self.root / name / f"{name}.pub")
            done = self.run_command("fedllm", "server", "register", str(self.folder), key)
            assert done.returncode == 0, done.stderr
        return self.root / name

    def start_site(self, name: str, prefix: Sequence[str] = (), **more: str) -> Started:
        """A site's start script."""
        command = [*prefix, str(self.root / name / "start-supernode.sh")]
        own = {SITE: name, "RESTART_S": "5", "RESTART_MAX_S": "5"}
        self.sites[name] = self.started(command, name, **{**own, **more})
        return self.sites[name]

    def nodes(self) -> list[str]:
        """States of all SuperNodes that the server knows."""
        done = self.run_command("flwr", "supernode", "list", "federation", "--format", "json")
        found = done.stdout.find("{")
        return [node["status"] for node in json.loads(done.stdout[found:])["nodes"]]

    def submit(self, output: Path, *overrides: str) -> Run:
        """``flwr run`` of all sites, one step a round, with its log streamed to a file."""
        if any(text.startswith("resume=") for text in overrides):
            wanted = list(overrides)
        else:
            sites = len(self.sites)
            keys = {text.partition("=")[0] for text in overrides}
            defaults = (
                "federation.engine=deployment",
                f"federation.num_clients={sites}",
                f"federation.sample_clients={sites}",
                "federation.min_replies=1",
                *QUICK,
                f"output_dir={output}",
            )
            chosen = [text for text in defaults if text.partition("=")[0] not in keys]
            wanted = [*chosen, *overrides]
        arguments = f'overrides="{" ".join(wanted)}"'
        app = str(self.folder / "app")
        command = [str(BIN / "flwr"), "run", app, "federation", "--stream"]
        self._number += 1
        stream = self.started([*command, "--run-config", arguments], f"run-{self._number}")
        return Run(output, stream)

    def processes(self, part: str, site: str | None = None) -> list[psutil.Process]:
        """Living processes whose command line holds `part`, of one site or of the server."""
        found = []
        for process in relatives(self.root):
            try:
                owner = process.environ().get(SITE)
            except psutil.Error:
                continue
            if owner == site and part in command_line(process):
                found.append(process)
        return found

    def kill(self, part: str, site: str | None = None) -> int:
        """SIGKILL to such processes; how many there were."""
        found = self.processes(part, site)
        for process in found:
            send(process, signal.SIGKILL)
        return len(found)

    def kill_site(self, name: str) -> None:
        """All processes of a site at once, as when its machine loses power."""
        self.kill("", name)
        self.sites[name].process.wait()

    def close(self) -> None:
        """End what still runs, and reap it."""
        for started in [*self.sites.values(), self.server]:
            if started is not None and started.process.poll() is None:
                started.process.terminate()
        wait_for(lambda: not relatives(self.root), 20)
        for process in relatives(self.root):
            send(process, signal.SIGCONT)
            send(process, signal.SIGKILL)
        self._stack.close()


def send(process: psutil.Process, number: int) -> None:
    """A signal, unless the process has ended."""
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)


def fill(file: Path) -> None:
    """Write until the disk is full."""
    with file.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(b"x" * 4096)


@contextmanager
def deployed(root: Path, sites: Sequence[str], **options: Any) -> Iterator[Deployment]:
    """A running server and running sites, each with records of its own."""
    deployment = Deployment(root, **options)
    try:
        deployment.start_server()
        for number, name in enumerate(sites):
            deployment.add_site(name, first=20 * number)
            deployment.start_site(name)
        yield deployment
    finally:
        deployment.close()
