"""Federations as their operators start them: server and sites as real processes on loopback."""

import json
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedllm_flwr.data.sources import DEMO
from fedllm_flwr.deployment.server_directory import init_server
from fedllm_flwr.deployment.site_directory import SiteOptions, init_site
from processes import BIN, environment, free_ports, nothing_left, relatives, started, wait_for

# Limits of a site with the few records of a test, which draws as a simulated client does.
SMALL = (
    *(f"min_records_per_{what}=1" for what in ("step", "round", "score")),
    "secret_draws=false",
)
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
        """The server's SuperLink."""
        name = "fedllm_flwr.deployment.superlink"
        [found] = [p for p in relatives(self.folder.parent) if name in command_of(p)]
        return found

    def statuses(self) -> list[str]:
        """Of all runs, the newest first."""
        listed = self.run("flwr", "list", "federation", "--format", "json").stdout
        return [run["status"] for run in json.loads(listed[listed.index("{") :])["runs"]]

    def submit(self, overrides: Sequence[str], *options: str) -> "subprocess.CompletedProcess[str]":
        """``flwr run`` with these overrides."""
        app, text = str(self.folder / "app"), " ".join(overrides)
        config = f'overrides="{text}"'
        return self.run("flwr", "run", app, "federation", "--run-config", config, *options)


def command_of(process: psutil.Process) -> str:
    """Command line of a process."""
    return " ".join(process.cmdline())


def every_other_record(name: str) -> list[str]:
    """Lines of the demo for a site: those of even or of odd number, by the name's length."""
    lines = (DEMO / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    return lines[len(name) % 2 :: 2][:40]


def make_site(
    folder: Path,
    name: str,
    port: int,
    ca: Path | None,
    lines: Sequence[str] | None = None,
    node: str = "",
    policy: Sequence[str] = (),
) -> Path:
    """Its directory, and a data file of `lines` beside it; None: every other record of the demo.

    Args:
        node: first lines of its node.toml.
        policy: key=value of its policy, besides `SMALL`.
    """
    data = folder / f"{name}.jsonl"
    data.write_text("".join(every_other_record(name) if lines is None else lines), "utf-8")
    options = SiteOptions(
        name,
        str(data),
        f"localhost:{port}",
        None if ca is None else str(ca),
        device="cpu",
        insecure=ca is None,
        approval="automatic",
        policy=(*SMALL, *policy),
    )
    init_site(folder / name, options)
    file = folder / name / "node.toml"
    file.write_text(node + file.read_text("utf-8"), "utf-8")
    return folder / name


@contextmanager
def directly(port: int) -> Iterator[int]:
    """No link between a site and the server's port but this machine's own."""
    yield port


@contextmanager
def running_federation(
    root: Path,
    sites: Mapping[str, Sequence[str] | None],
    link: Callable[[int], AbstractContextManager[int]] = directly,
    nodes: Mapping[str, str] | None = None,
    policies: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Federation]:
    """Server and registered sites with their records, started with their directories' scripts.

    Args:
        nodes: first lines of the sites' node.toml, by name.
        policies: key=value of the sites' policies, by name.
        link: makes a site's own way to a port of the server; the port where it begins.
    """
    server, base = root / "server", free_ports(5)
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

    names = ("appio", "fleet", "control", "superlink_health", "superexec_health")
    ports = {name: base + i for i, name in enumerate(names)}
    with ExitStack() as stack:
        stack.enter_context(started([str(server / "start.sh")], root))
        assert wait_for(lambda: listens(ports["fleet"]), 180)
        for name, lines in sites.items():
            port = stack.enter_context(link(ports["fleet"]))
            own = (nodes or {}).get(name, ""), (policies or {}).get(name, ())
            site = make_site(root, name, port, server / "ca.crt", lines, *own)
            done = run("fedllm", "server", "register", str(server), str(site / f"{name}.pub"))
            assert f"Registered {name}" in done.stdout, done.stderr
            stack.enter_context(started([str(site / "start-supernode.sh")], root))
        yield Federation(server, ports, run)
        stack.close()
        assert nothing_left(root) == []


def listens(port: int) -> bool:
    """Whether something answers on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def rounds_of(output: Path) -> list[dict[str, Any]]:
    """What a run has recorded so far, from round 0."""
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]
