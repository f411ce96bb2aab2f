"""``fedllm doctor``: checks of the environment, each with a remedy."""

import contextlib
import importlib.metadata
import ipaddress
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedllm_flwr.evaluation.sandbox.bubblewrap import why_refused
from fedllm_flwr.flower.names import RANGE, SEEN, is_http, is_seen, version
from fedllm_flwr.reporting.text import format_bytes, one_line

ASSETS = Path(__file__).parents[1] / "assets"
DISTRIBUTION = "fedllm-flwr"
NAME_WIDTH = 9  # length of the longest check name
RAY_LIMIT_S = 90.0
_EMBEDDED = (
    "tiny/config.json",
    "tiny/model.safetensors",
    "tiny/tokenizer.json",
    "demo/train.jsonl",
    "demo/test.jsonl",
)
_LOW_MEMORY = 3 * 10**9  # bytes
_LOW_DISK, _FULL_DISK = 5 * 10**9, 5 * 10**8  # bytes
_RAY_SCRIPT = """
from fedllm_flwr.simulation.access import private_ray
with private_ray() as folder:
    import ray
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR", object_store_memory=100_000_000, _temp_dir=str(folder))
    print("answer", ray.get(ray.remote(lambda: 6 * 7).remote()))
"""


@dataclass(frozen=True)
class Check:
    """One finding; `status` is ok, warn or fail, `remedy` one line or empty."""

    name: str
    status: str
    detail: str
    remedy: str = ""


def run_checks(
    quick: bool = False, output_dir: Path = Path("outputs"), hub: bool = False
) -> Iterator[Check]:
    """Run the checks one by one, so that each result can be printed at once.

    Args:
        quick: skip Ray, which takes seconds to start.
        output_dir: where runs are written.
        hub: also try to reach the Hugging Face Hub.
    """
    yield from check_packages()
    yield from check_devices()
    yield from check_quantization()
    yield from check_commands()
    yield from check_loopback()
    yield from check_local_superlink()
    yield from check_disk(output_dir)
    yield from check_assets()
    yield from check_sandbox()
    if not quick:
        yield from check_ray()
    if hub:
        yield from check_hub()


def check_lines(check: Check, width: int = NAME_WIDTH) -> list[str]:
    """One line for the finding and one for its remedy."""
    lines = [f"  {check.status:<4}  {check.name:<{width}}  {one_line(check.detail)}"]
    if check.remedy:
        lines.append(f"{' ' * (width + 10)}{one_line(check.remedy)}")
    return lines


def verdict(checks: Sequence[Check]) -> str:
    """A summary of all findings in one sentence."""
    failed = [check.name for check in checks if check.status == "fail"]
    warned = [check.name for check in checks if check.status == "warn"]
    if failed:
        return f"Not ready: {', '.join(failed)} failed."
    return f"Ready, with warnings: {', '.join(warned)}." if warned else "Ready."


def exit_status(checks: Sequence[Check]) -> int:
    """1 if a check failed; warnings do not count."""
    return int(any(check.status == "fail" for check in checks))


def check_packages() -> list[Check]:
    """Versions of Python and of the required packages against the declared ranges."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    distribution = importlib.metadata.distribution(DISTRIBUTION)
    wanted = distribution.metadata["Requires-Python"] or ""
    python = ".".join(map(str, sys.version_info[:3]))
    fits = SpecifierSet(wanted).contains(python, prereleases=True)
    checks = [
        Check("python", "ok", f"{python} in {sys.prefix}")
        if fits
        else Check("python", "fail", f"{python}, wanted {wanted}", f"use Python {wanted}")
    ]
    requirements = [Requirement(text) for text in distribution.requires or ()]
    needed = [item for item in requirements if item.marker is None or item.marker.evaluate()]
    bad = [check for item in needed if (check := package_check(str(item))) is not None]
    if not bad:
        torch, flwr = (importlib.metadata.version(name) for name in ("torch", "flwr"))
        detail = f"{len(needed)} required packages in range (torch {torch}, flwr {flwr})"
        checks.append(Check("packages", "ok", detail))
    return checks + bad


def package_check(requirement: str) -> Check | None:
    """A failed check if the installed package does not meet `requirement`, otherwise None."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    remedy = f"pip install '{wanted.name}{wanted.specifier}'"
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Check("packages", "fail", f"{wanted.name} is not installed", remedy)
    if wanted.specifier.contains(version, prereleases=True):
        return None
    detail = f"{wanted.name} {version}, wanted {wanted.specifier}"
    return Check("packages", "fail", detail, remedy)


def check_devices() -> list[Check]:
    """CPU threads, memory and GPUs."""
    import torch

    available = psutil.virtual_memory().available
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{cores} CPU threads, {format_bytes(available)} memory free"
    low = available < _LOW_MEMORY
    remedy = "close other programs; the demo needs about 3 GB" if low else ""
    checks = [Check("cpu", "warn" if low else "ok", cpu, remedy)]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = "bfloat16" if torch.cuda.is_bf16_supported(False) else "no bfloat16"
        detail = f"cuda:{index} {device.name}, {format_bytes(device.total_memory)}, {bf16}"
        checks.append(Check("gpu", "ok", detail))
    if torch.backends.mps.is_available():
        checks.append(Check("gpu", "ok", "Apple GPU (mps)"))
    if len(checks) > 1:
        return checks
    if shutil.which("nvidia-smi") is None:
        return [*checks, Check("gpu", "ok", "none; everything runs on the CPU")]
    if torch.version.cuda is None:
        detail = "NVIDIA driver found, but this torch is built for the CPU only"
        return [*checks, Check("gpu", "warn", detail, "install torch for CUDA")]
    detail = f"torch for CUDA {torch.version.cuda} finds no GPU although nvidia-smi exists"
    remedy = "check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return [*checks, Check("gpu", "warn", detail, remedy)]


def check_quantization() -> list[Check]:
    """Accuracy of bitsandbytes in nf4 and int8 on the device that runs use."""
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs missing optional kernels
    device = "cuda" if torch.cuda.is_available() else "cpu"
    remedy = "run with quantization=none, or pip install -U bitsandbytes"
    checks = []
    for kind, tolerance in (("nf4", 0.25), ("int8", 0.05)):
        try:
            error = quantization_error(kind, device)
        except Exception as reason:  # a missing library, kernel or instruction set
            checks.append(Check(kind, "warn", f"{device}: {reason}", remedy))
            continue
        good = error < tolerance
        detail = f"works on {device} (relative error {error:.3f})"
        checks.append(Check(kind, "ok", detail) if good else Check(kind, "warn", detail, remedy))
    return checks


def quantization_error(kind: str, device: str) -> float:
    """||Q(W) x - W x|| / ||W x|| of a 64 x 64 linear layer, on seeded normal numbers."""
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    inputs = torch.randn(8, 64, generator=generator)
    layer = (
        Linear4bit(64, 64, bias=False, quant_type="nf4")
        if kind == "nf4"
        else Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    )
    layer.load_state_dict({"weight": weight})
    dtype = torch.float16 if device == "cuda" else torch.float32
    with torch.no_grad():
        outputs = layer.to(device)(inputs.to(device, dtype)).float().cpu()
    exact = inputs @ weight.T
    return float((outputs - exact).norm() / exact.norm())


def check_commands() -> list[Check]:
    """Flower's commands, next to this Python or on PATH."""
    names = ("flwr", "flower-superlink", "flower-supernode")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing = [name for name in names if shutil.which(name, path=path) is None]
    if missing:
        remedy = f"pip install --force-reinstall 'flwr[simulation]{RANGE}'"
        return [Check("flower", "fail", f"not found: {', '.join(missing)}", remedy)]
    installed = version()
    if not is_seen(installed):
        detail = f"{installed}: simulation only; servers and sites take {' or '.join(SEEN)}"
        remedy = f"pip install 'flwr[simulation]=={SEEN[-1]}.*' (docs/flower-versions.md)"
        return [Check("flower", "warn", detail, remedy)]
    follows = (
        "sites speak gRPC, its own commands and apps HTTP on the server's address; flwr run needs "
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 and --federation-config "
        "'num-supernodes=10' (docs/flower-versions.md)"
        if is_http()
        else "gRPC on every interface; flwr run uses this environment and ten nodes"
    )
    return [Check("flower", "ok", f"{installed}: {follows}")]


def check_loopback() -> list[Check]:
    """Connections between processes on 127.0.0.1."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        remedy = "allow connections on 127.0.0.1 (firewall, container settings)"
        return [Check("ports", "fail", f"no connection on 127.0.0.1: {error}", remedy)]
    if captured := captured_by_proxy(dict(os.environ)):
        remedy = "export no_proxy=127.0.0.1,localhost"
        detail = f"{captured} is set and no_proxy does not exclude 127.0.0.1"
        return [Check("ports", "warn", detail, remedy)]
    return [Check("ports", "ok", "free ports on 127.0.0.1, connections work")]


def captured_by_proxy(environment: dict[str, str]) -> str | None:
    """Name of the variable that makes gRPC send loopback connections to a proxy, or None.

    gRPC reads only lower-case names, matches an entry of no_proxy as a suffix of the host or as a
    network, and does not support "*" there (measured with grpcio 1.85.3).
    """
    chosen = [key for key in ("grpc_proxy", "https_proxy", "http_proxy") if environment.get(key)]
    exceptions = environment.get("no_grpc_proxy") or environment.get("no_proxy") or ""
    for entry in filter(None, map(str.strip, exceptions.split(","))):
        if "127.0.0.1".endswith(entry):
            return None
        with contextlib.suppress(ValueError):
            network = ipaddress.ip_network(entry, strict=False)
            if "/" in entry and ipaddress.ip_address("127.0.0.1") in network:
                return None
    return chosen[0] if chosen else None


def check_local_superlink(port: int | None = None) -> list[Check]:
    """A local SuperLink left by an earlier ``flwr run``, which would receive later runs."""
    port = port or int(os.environ.get("FLWR_LOCAL_CONTROL_API_PORT", "39093"))
    with socket.socket() as probe:
        probe.settimeout(2)
        if probe.connect_ex(("127.0.0.1", port)):
            return [Check("superlink", "ok", f"no local SuperLink on port {port}")]
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        text, pid = " ".join(command), process.pid
        if "flower-superlink" not in text or f":{port}" not in text:
            continue
        if any(Path(part).is_relative_to(sys.prefix) for part in command[:2]):
            detail = f"flwr run's local SuperLink of this environment is running (process {pid})"
            return [Check("superlink", "ok", detail)]
        detail = f"a local SuperLink of another environment ({command[0]}) would capture flwr run"
        return [Check("superlink", "warn", detail, f"kill {pid}")]
    detail = f"port {port}, which flwr run uses for its SuperLink, is used by another program"
    remedy = "export FLWR_LOCAL_CONTROL_API_PORT=<free port> before flwr run"
    return [Check("superlink", "warn", detail, remedy)]


def check_disk(output_dir: Path) -> list[Check]:
    """Write access and free space for runs."""
    folder = output_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        detail = f"cannot write in {folder}: {error.strerror or error}"
        return [Check("disk", "fail", detail, "give another directory with output_dir=...")]
    detail = f"{format_bytes(free)} free in {folder}"
    if free >= _LOW_DISK:
        return [Check("disk", "ok", detail)]
    status = "fail" if free < _FULL_DISK else "warn"
    return [Check("disk", status, detail, "free some space, or give another output_dir=...")]


def check_assets(assets: Path = ASSETS) -> list[Check]:
    """The embedded model and data of the default run."""
    missing = [name for name in _EMBEDDED if not (assets / name).is_file()]
    if missing:
        remedy = "pip install --force-reinstall --no-deps fedllm-flwr"
        return [Check("demo", "fail", f"missing in {assets}: {', '.join(missing)}", remedy)]
    size = sum(path.stat().st_size for path in assets.rglob("*") if path.is_file())
    return [Check("demo", "ok", f"embedded model and data present ({format_bytes(size)})")]


def check_sandbox() -> list[Check]:
    """The sandbox of ``fedllm evaluate --allow-code-execution``."""
    if (reason := why_refused()) is None:
        detail = "generated code runs under bubblewrap, with isolated files, processes and network"
        return [Check("sandbox", "ok", detail)]
    what, _, remedy = reason.partition(": ")
    return [Check("sandbox", "warn", f"generated code cannot be run: {what}", remedy)]


def check_ray(limit_s: float = RAY_LIMIT_S) -> list[Check]:
    """Start Ray in a separate process with a time limit."""
    remedy = "run with federation.engine=inprocess; check ulimit -n, /dev/shm and /tmp"
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
        parent = psutil.Process(process.pid)
        for member in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.communicate()
        return [Check("ray", "warn", f"did not start within {limit_s:g} s", remedy)]
    if "answer 42" in out:
        return [Check("ray", "ok", "starts and answers")]
    reason = ([line for line in err.splitlines() if line.strip()] or ["no answer"])[-1]
    return [Check("ray", "warn", reason, remedy)]


def check_hub(limit_s: float = 10.0) -> list[Check]:
    """Access to the Hugging Face Hub."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(endpoint, timeout=limit_s).close()
    except urllib.error.HTTPError:
        pass  # it responded
    except (OSError, ValueError) as error:
        remedy = "use local copies: model.path=/path/to/model data.path=/path/to/file"
        detail = f"{endpoint} cannot be reached: {getattr(error, 'reason', error)}"
        return [Check("hub", "warn", detail, remedy)]
    return [Check("hub", "ok", f"{endpoint} answers")]
