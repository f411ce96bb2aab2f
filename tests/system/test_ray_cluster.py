"""A simulation on a Ray cluster that runs already: two nodes on this machine, shares of a GPU."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from processes import nothing_left, relatives, started, wait_for
from tiny_runs import outcome, run_tiny, tiny

pytestmark = pytest.mark.slow

OVERRIDES = ["federation.num_rounds=1", "federation.sample_clients=3", "training.max_steps=1"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU and, as Ray believes, one GPU."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "num_gpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        yield cluster
    finally:
        cluster.shutdown()


def workers_by_node(cluster: Any) -> dict[int, int]:
    """Number of client workers per node, by the process id of the node's raylet."""
    found: dict[int, int] = {}
    for process in psutil.process_iter(["cmdline", "ppid"]):
        command = " ".join(process.info["cmdline"] or [])
        if "ray::" in command and "ClientAppActor" in command:
            found[process.info["ppid"]] = found.get(process.info["ppid"], 0) + 1
    raylets = {
        info.process.pid
        for node in cluster.list_all_nodes()
        for info in node.all_processes["raylet"]
    }
    return {pid: count for pid, count in found.items() if pid in raylets}


def command_of_run(cluster: Any, output: Path, gpus: float) -> list[str]:
    own = [
        "federation.engine=ray",
        f"federation.ray_address={cluster.address}",
        f"federation.client_gpus={gpus}",
        f"output_dir={output}",
    ]
    return ["fedllm", "run", *tiny(*OVERRIDES, *own)]


def test_clients_run_on_both_nodes_with_half_a_gpu_each(cluster: Any, tmp_path: Path) -> None:
    """The same bits as in one process; the cluster is still there afterwards."""
    output, seen = tmp_path / "run", dict[int, int]()
    with started(command_of_run(cluster, output, 0.5), tmp_path) as process:

        def ended() -> bool:
            seen.update(workers_by_node(cluster))
            return process.poll() is not None

        assert wait_for(ended, 500)
        assert process.returncode == 0, process.communicate()
    assert len(seen) == 2, seen  # nodes
    expected = run_tiny(tmp_path / "expected", *OVERRIDES)
    assert outcome(output) == outcome(expected)
    assert nothing_left(tmp_path) == []
    assert all(node.any_processes_alive() for node in cluster.list_all_nodes())


def test_more_gpus_than_any_node_has_are_refused(cluster: Any, tmp_path: Path) -> None:
    """Ray would wait without end."""
    with started(command_of_run(cluster, tmp_path / "run", 1.5), tmp_path) as process:
        _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert said == (
        "error: federation.client_gpus=1.5, but the largest machine of the Ray cluster has 1 GPU; "
        "set federation.client_gpus=1 or less.\n"
    )


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
    assert process.returncode == 1
    assert f"federation.ray_address={address}: no Ray cluster answers there" in said
    assert len(said.splitlines()) == 1
    assert relatives(tmp_path) == []
