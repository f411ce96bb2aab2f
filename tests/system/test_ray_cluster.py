"""A simulation on a Ray cluster that runs already: two nodes on this machine, shares of a GPU."""

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from processes import environment, named, nothing_left, relatives, started, wait_for
from tiny_runs import outcome, run_tiny, tiny

pytestmark = pytest.mark.slow

OVERRIDES = ["federation.num_rounds=1", "federation.sample_clients=3", "training.max_steps=1"]
NODES = Path(__file__).parents[1] / "ray_nodes.py"


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    address: str
    variables: Mapping[str, str]  # by which a process may use it
    process: "subprocess.Popen[str]"

    def raylets(self) -> list[int]:
        """Process ids of its nodes."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [process.pid for process in named(below, "raylet")]


@contextmanager
def running_cluster(cwd: Path, **variables: str) -> Iterator[Cluster]:
    """Two nodes, started with these environment variables."""
    process = subprocess.Popen(
        [sys.executable, str(NODES)],
        cwd=cwd,
        env=environment(cwd, RAY_USAGE_STATS_ENABLED="0", **variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    try:
        # Ray's own remarks come first.
        address = next(line.strip() for line in process.stdout if line.count(":") == 1)
        yield Cluster(address, variables, process)
        said, _ = process.communicate(timeout=60)
        assert "alive" in said.split()
    finally:
        for left in relatives(cwd):
            left.kill()
        process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One that asks for a token."""
    folder = tmp_path_factory.mktemp("cluster")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with running_cluster(folder, **token) as running:
        yield running


def workers_by_node(cluster: Cluster) -> dict[int, int]:
    """Number of client workers per node, by the process id of the node's raylet."""
    found: dict[int, int] = {}
    for process in psutil.process_iter(["cmdline", "ppid"]):
        command = " ".join(process.info["cmdline"] or [])
        if "ray::" in command and "ClientAppActor" in command:
            found[process.info["ppid"]] = found.get(process.info["ppid"], 0) + 1
    return {pid: found[pid] for pid in cluster.raylets() if pid in found}


def command_of_run(cluster: Cluster, output: Path, gpus: float) -> list[str]:
    own = [
        "federation.engine=ray",
        f"federation.ray_address={cluster.address}",
        f"federation.client_gpus={gpus}",
        f"output_dir={output}",
    ]
    return ["fedllm", "run", *tiny(*OVERRIDES, *own)]


def refusal(cluster: Cluster, cwd: Path, **variables: str) -> str:
    """The one line with which a run on the cluster is refused."""
    command = command_of_run(cluster, cwd / "run", 0.5)
    with started(command, cwd, HOME=str(cwd), **variables) as process:
        _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said
    assert len(said.splitlines()) == 1, said
    return said


def test_clients_run_on_both_nodes_with_half_a_gpu_each(cluster: Cluster, tmp_path: Path) -> None:
    """The same bits as in one process; the cluster is still there afterwards."""
    output, seen = tmp_path / "run", dict[int, int]()
    with started(command_of_run(cluster, output, 0.5), tmp_path, **cluster.variables) as process:

        def ended() -> bool:
            seen.update(workers_by_node(cluster))
            return process.poll() is not None

        assert wait_for(ended, 500)
        assert process.returncode == 0, process.communicate()
    assert len(seen) == 2, seen  # nodes
    expected = run_tiny(tmp_path / "expected", *OVERRIDES)
    assert outcome(output) == outcome(expected)
    assert nothing_left(tmp_path) == []
    assert len(cluster.raylets()) == 2


def test_more_gpus_than_any_node_has_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    """Ray would wait without end."""
    command = command_of_run(cluster, tmp_path / "run", 1.5)
    with started(command, tmp_path, **cluster.variables) as process:
        _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert said == (
        "error: federation.client_gpus=1.5, but the largest machine of the Ray cluster has 1 GPU; "
        "set federation.client_gpus=1 or less.\n"
    )


def test_a_cluster_is_not_joined_without_its_token(cluster: Cluster, tmp_path: Path) -> None:
    """It is looked for where Ray's own documents say."""
    said = refusal(cluster, tmp_path)
    assert "no token for the cluster; put the one that it was started with into RAY_AUTH_TOKEN" in (
        said
    )
    assert str(tmp_path / ".ray" / "auth_token") in said


def test_a_cluster_that_asks_for_no_token_is_refused(tmp_path: Path) -> None:
    """Unless the user says that it is meant to be open."""
    (tmp_path / "cluster").mkdir()
    with running_cluster(tmp_path / "cluster", RAY_AUTH_MODE="disabled") as opened:
        said = refusal(opened, tmp_path)
        assert "the cluster asks for no token, so whoever reaches it can run code on it" in said
        command = command_of_run(opened, tmp_path / "run", 1.5)
        with started(command, tmp_path, RAY_AUTH_MODE="disabled") as process:
            _, said = process.communicate(timeout=300)
        assert "the largest machine of the Ray cluster has 1 GPU" in said


def test_something_else_at_the_address_is_one_line_in_time(tmp_path: Path) -> None:
    """A server that listens and is no Ray, which says nothing."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        began = time.monotonic()
        command = ["fedllm", "run", *tiny("federation.engine=ray")]
        command.append(f"federation.ray_address={address}")
        with started(command, tmp_path) as process:
            try:
                _, said = process.communicate(timeout=240)
            except subprocess.TimeoutExpired:
                pytest.fail(f"still waiting after {time.monotonic() - began:.0f} s")
    assert process.returncode == 2
    assert f"federation.ray_address={address}: no Ray cluster answers there" in said
    assert len(said.splitlines()) == 1
    assert relatives(tmp_path) == []
