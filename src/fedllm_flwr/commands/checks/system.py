"""Flower's commands, ports, processes, disk, Ray and the hub."""

import contextlib
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from fedllm_flwr.commands.checks import Check
from fedllm_flwr.evaluation.sandbox.bubblewrap import why_refused
from fedllm_flwr.reporting.text import format_bytes

ASSETS = Path(__file__).parents[2] / "assets"
RAY_LIMIT_S = 90.0
_EMBEDDED = (
    "tiny/config.json",
    "tiny/model.safetensors",
    "tiny/tokenizer.json",
    "demo/train.jsonl",
    "demo/test.jsonl",
)
_LOW_DISK, _FULL_DISK = 5 * 10**9, 5 * 10**8  # bytes
_RAY_SCRIPT = """
from fedllm_flwr.simulation.access import private_ray
with private_ray() as folder:
    import ray
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR", object_store_memory=100_000_000, _temp_dir=str(folder))
    print("answer", ray.get(ray.remote(lambda: 6 * 7).remote()))
"""


def check_commands() -> list[Check]:
    """Flower's commands, beside this Python or on the search path."""
    names = ("flwr", "flower-superlink", "flower-supernode")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing = [name for name in names if shutil.which(name, path=path) is None]
    if missing:
        remedy = "pip install --force-reinstall 'flwr[simulation]>=1.31,<1.32'"
        return [Check("flower", "fail", f"not found: {', '.join(missing)}", remedy)]
    return [Check("flower", "ok", f"{', '.join(names)} found")]


def check_loopback() -> list[Check]:
    """Whether the processes of a run can reach each other on this machine."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        remedy = "allow connections on 127.0.0.1 (firewall, container settings)"
        return [Check("ports", "fail", f"no connection on 127.0.0.1: {error}", remedy)]
    if captured := captured_by_proxy(dict(os.environ)):
        remedy = "export no_proxy=127.0.0.1,localhost"
        detail = f"{captured} is set and no_proxy does not except 127.0.0.1"
        return [Check("ports", "warn", detail, remedy)]
    return [Check("ports", "ok", "free ports on 127.0.0.1, connections work")]


def captured_by_proxy(environment: dict[str, str]) -> str | None:
    """The variable by which gRPC would send even loopback connections to a proxy, or None.

    gRPC reads the lower-case names only, takes an entry of no_proxy as the end of a host's name
    or as a network, and knows no "*" there (measured with grpcio 1.85.3).
    """
    chosen = [key for key in ("grpc_proxy", "https_proxy", "http_proxy") if environment.get(key)]
    excepted = environment.get("no_grpc_proxy") or environment.get("no_proxy") or ""
    entries = [part.strip() for part in excepted.split(",") if part.strip()]
    return chosen[0] if chosen and not any(map(_excepts_loopback, entries)) else None


def _excepts_loopback(entry: str) -> bool:
    if "/" in entry:
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address("127.0.0.1") in ipaddress.ip_network(entry, strict=False)
    return "127.0.0.1".endswith(entry)


def check_local_superlink(port: int | None = None) -> list[Check]:
    """A local SuperLink left behind by ``flwr run``, which captures later runs of ``flwr run``."""
    port = port or int(os.environ.get("FLWR_LOCAL_CONTROL_API_PORT", "39093"))
    with socket.socket() as probe:
        probe.settimeout(2)
        if probe.connect_ex(("127.0.0.1", port)):
            return [Check("superlink", "ok", f"no local SuperLink on port {port}")]
    found = _superlink_process(port)
    if found is None:
        detail = f"port {port}, where flwr run looks for its SuperLink, is taken by a program"
        remedy = "export FLWR_LOCAL_CONTROL_API_PORT=<free port> before flwr run"
        return [Check("superlink", "warn", detail, remedy)]
    pid, command = found
    if any(Path(part).is_relative_to(sys.prefix) for part in command[:2]):
        detail = f"flwr run's local SuperLink of this environment is up (process {pid})"
        return [Check("superlink", "ok", detail)]
    detail = f"a local SuperLink of another environment ({command[0]}) would capture flwr run"
    return [Check("superlink", "warn", detail, f"kill {pid}")]


def _superlink_process(port: int) -> tuple[int, list[str]] | None:
    """Process id and command line of the SuperLink whose Control API has this port."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        texts = " ".join(command)
        if "flower-superlink" in texts and f":{port}" in texts:
            return process.pid, command
    return None


def check_disk(output_dir: Path) -> list[Check]:
    """Whether runs can be written, and how much space is left."""
    folder = output_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        detail = f"cannot write in {folder}: {error.strerror or error}"
        return [Check("disk", "fail", detail, "give another place with output_dir=...")]
    detail = f"{format_bytes(free)} free in {folder}"
    if free >= _LOW_DISK:
        return [Check("disk", "ok", detail)]
    status = "fail" if free < _FULL_DISK else "warn"
    return [Check("disk", status, detail, "free some space, or give another output_dir=...")]


def check_assets(assets: Path = ASSETS) -> list[Check]:
    """The embedded model and data, without which the default run cannot start."""
    missing = [name for name in _EMBEDDED if not (assets / name).is_file()]
    if missing:
        remedy = "pip install --force-reinstall --no-deps fedllm-flwr"
        return [Check("demo", "fail", f"missing in {assets}: {', '.join(missing)}", remedy)]
    size = sum(path.stat().st_size for path in assets.rglob("*") if path.is_file())
    return [Check("demo", "ok", f"embedded model and data present ({format_bytes(size)})")]


def check_sandbox() -> list[Check]:
    """What would contain the programs that ``fedllm evaluate --allow-code-execution`` runs."""
    if (reason := why_refused()) is None:
        detail = "generated code runs under bubblewrap: own files, processes, users and network"
        return [Check("sandbox", "ok", detail)]
    what, _, remedy = reason.partition(": ")
    return [Check("sandbox", "warn", f"generated code cannot be run: {what}", remedy)]


def check_ray(limit_s: float = RAY_LIMIT_S) -> list[Check]:
    """Whether Ray starts and answers, in a process of its own with a time limit."""
    remedy = "run with federation.engine=inprocess; look at ulimit -n, /dev/shm and /tmp"
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-c", _RAY_SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        _kill_tree(process)
        return [Check("ray", "warn", f"did not start within {limit_s:g} s", remedy)]
    if "answer 42" in out:
        return [Check("ray", "ok", "starts and answers")]
    reason = ([line for line in err.splitlines() if line.strip()] or ["no answer"])[-1]
    return [Check("ray", "warn", reason, remedy)]


def _kill_tree(process: "subprocess.Popen[str]") -> None:
    """End a process and what it started."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()


def check_hub(limit_s: float = 10.0) -> list[Check]:
    """Whether models and data sets can be fetched."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(endpoint, timeout=limit_s).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except (OSError, ValueError) as error:
        remedy = "use local copies: model.path=/path/to/model data.path=/path/to/file"
        return [
            Check(
                "hub",
                "warn",
                f"{endpoint} cannot be reached: {getattr(error, 'reason', error)}",
                remedy,
            )
        ]
    return [Check("hub", "ok", f"{endpoint} answers")]
