"""Packages, devices and quantization."""

import importlib.metadata
import logging
import os
import shutil
import sys

import psutil

from fedllm_flwr.commands.checks import Check
from fedllm_flwr.reporting.text import format_bytes

DISTRIBUTION = "fedllm-flwr"
_LOW_MEMORY = 3 * 10**9  # bytes


def check_packages() -> list[Check]:
    """Python and every required package against the ranges that this package declares."""
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
    """A failed check where an installed package does not meet `requirement`; None where it does."""
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
    """CPU threads and memory, and what torch can compute on besides."""
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
    if len(checks) == 1:
        checks.append(_no_gpu(torch.version.cuda))
    return checks


def _no_gpu(cuda: str | None) -> Check:
    """Why there is no GPU: none in the machine, or one that this build of torch cannot use."""
    if shutil.which("nvidia-smi") is None:
        return Check("gpu", "ok", "none; everything runs on the CPU")
    if cuda is None:
        build = "this torch is built for the CPU only"
        return Check("gpu", "warn", f"NVIDIA driver found, but {build}", "install torch for CUDA")
    detail = f"torch for CUDA {cuda} sees no GPU although nvidia-smi is there"
    return Check("gpu", "warn", detail, "look at nvidia-smi and at CUDA_VISIBLE_DEVICES")


def check_quantization() -> list[Check]:
    """Whether bitsandbytes computes what it should, in nf4 and int8, on the device of a run."""
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports optional kernels
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
