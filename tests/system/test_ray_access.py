"""Nobody but the run itself uses the Ray that `fedllm run` has started."""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from fedllm_flwr.simulation.access import SPANS_MACHINES
from processes import BIN, command_line, named, nothing_left, relatives, started, wait_for
from tiny_runs import tiny

pytestmark = pytest.mark.slow

STRANGER = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
# Who tries, and what refuses. Ray looks for a local address at that of the network, unless
# told to stay here.
NETWORK = pytest.param({"RAY_AUTH_MODE": "disabled"}, "Failed to connect to GCS", id="network")
HERE = {SPANS_MACHINES: "0"}
NO_TOKEN = pytest.param(HERE | {"RAY_AUTH_MODE": "disabled"}, "Unauthenticated", id="no token")
ANOTHER = HERE | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
OTHER_TOKEN = pytest.param(ANOTHER, "Unauthenticated", id="another token")
CONNECT = "import ray; ray.init(address={address!r}); print('joined')"
CALLS = (
    "/ray.rpc.NodeInfoGcsService/RegisterNode",
    "/ray.rpc.NodeInfoGcsService/CheckAlive",
    "/ray.rpc.JobInfoGcsService/AddJob",
    "/ray.rpc.ActorInfoGcsService/RegisterActor",
    "/ray.rpc.InternalKVGcsService/InternalKVPut",
)


@dataclass(frozen=True)
class RunningRay:
    """The Ray of a run that is under way."""

    address: str
    processes: list[psutil.Process]  # of the run, all


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRay]:
    """A run with clients at work, from the shell of a user who has set nothing."""
    cwd = tmp_path_factory.mktemp("run")
    overrides = tiny("federation.engine=ray", "federation.num_rounds=5000", f"output_dir={cwd}/run")
    with started(["fedllm", "run", *overrides], cwd) as process:

        def at_work() -> bool:
            assert process.poll() is None, process.communicate()
            return any("ClientAppActor" in command_line(one) for one in relatives(cwd))

        assert wait_for(at_work, 240)
        [gcs] = named(relatives(cwd), "gcs_server")
        [port] = [address.port for address in _listening(gcs)]
        yield RunningRay(f"127.0.0.1:{port}", relatives(cwd))
    assert nothing_left(cwd) == []


def _listening(process: psutil.Process) -> list[Any]:
    connections = process.net_connections("inet")
    return [one.laddr for one in connections if one.status == psutil.CONN_LISTEN]


def test_every_socket_listens_on_loopback(running: RunningRay) -> None:
    listening = [
        (process.name(), address.ip.removeprefix("::ffff:"))
        for process in running.processes
        if process.is_running()
        for address in _listening(process)
    ]
    assert len(listening) > 3  # GCS, raylet twice, driver and workers
    assert {ip for _, ip in listening} == {"127.0.0.1"}, listening


@pytest.mark.parametrize("call", CALLS)
def test_a_call_without_the_token_is_refused(running: RunningRay, call: str) -> None:
    for metadata in ((), (("authorization", f"Bearer {'0' * 64}"),)):
        with (
            grpc.insecure_channel(running.address) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            channel.unary_unary(call)(b"", timeout=60, metadata=metadata)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(("variables", "refusal"), [NETWORK, NO_TOKEN, OTHER_TOKEN])
def test_a_foreign_job_is_refused(
    running: RunningRay, variables: dict[str, str], refusal: str
) -> None:
    """`ray.init` with the run's address: from the network, and by a process of this machine."""
    command = [sys.executable, "-c", CONNECT.format(address=running.address)]
    assert "joined" not in tries(command, variables, refusal)


@pytest.mark.parametrize(("variables", "refusal"), [NETWORK])
def test_a_foreign_node_is_refused(
    running: RunningRay, variables: dict[str, str], refusal: str, tmp_path: Path
) -> None:
    """`ray start`, which would run the run's tasks, and get its messages."""
    command = [str(BIN / "ray"), "start", "--address", running.address, "--num-cpus", "1"]
    said = tries([*command, "--temp-dir", str(tmp_path / "ray")], variables, refusal)
    assert "Ray runtime started" not in said


def tries(command: list[str], variables: dict[str, str], refusal: str) -> str:
    """What a stranger's command says until it tells of its refusal; it would go on trying."""
    process = subprocess.Popen(
        command,
        env={**STRANGER, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    limit = threading.Timer(120, process.kill)
    limit.start()
    said = ""
    assert process.stdout
    while refusal not in said and (line := process.stdout.readline()):
        said += line
    limit.cancel()
    process.kill()
    said += process.communicate()[0]
    assert refusal in said, said
    assert process.returncode != 0
    return said


def test_the_token_is_on_no_command_line(running: RunningRay) -> None:
    [token] = {process.environ()["RAY_AUTH_TOKEN"] for process in _with_token(running)}
    assert len(token) == 64
    everyone = list(psutil.process_iter(["cmdline"]))
    assert not [one for one in everyone if token in " ".join(one.info["cmdline"] or [])]


def _with_token(running: RunningRay) -> list[psutil.Process]:
    alive = [process for process in running.processes if process.is_running()]
    return [process for process in alive if process.environ().get("RAY_AUTH_TOKEN")]


def test_sockets_and_logs_lie_where_no_other_user_can_enter(running: RunningRay) -> None:
    """Ray gives its own folders to everybody (mode 777)."""
    [raylet] = named(running.processes, "raylet")
    [argument] = [text for text in raylet.cmdline() if text.startswith("--session_dir=")]
    private = Path(argument.partition("=")[2]).parents[1]
    assert private.name.startswith("fedllm-")
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
