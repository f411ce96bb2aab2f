"""Device, precision and attention implementation of a model, with defaults per device."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import import_utils

from fedllm_flwr.config.schema import ModelConfig, TrainingConfig
from fedllm_flwr.errors import ConfigError


def resolve_device(requested: str) -> torch.device:
    """The device of ``training.device``; auto prefers CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: this machine does not have the requested device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if requested == "auto":
        requested = next(name for name, there in available.items() if there)
    if not available[requested]:
        raise ConfigError(
            f"training.device={requested}, but this machine has none that torch can use; "
            "use training.device=auto or cpu.",
            "it lacks the device that its node config names",
        )
    return torch.device(requested)


def resolve_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The dtype of the base model's weights and of the forward pass.

    auto: bfloat16 on CUDA devices that support it, float16 on older ones, float32 elsewhere.
    Adapters are always float32.
    """
    if requested != "auto":
        dtype: torch.dtype = getattr(torch, requested)
        return dtype
    if device.type != "cuda":
        return torch.float32
    computes_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if computes_bfloat16 else torch.float16


# Packages of FlashAttention, newest first, and the compute capability that each needs.
_FLASH = {"flash_attention_4": 9, "flash_attention_3": 9, "flash_attention_2": 8}


def resolve_attention(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention implementation of ``model.attention``.

    auto: the newest FlashAttention that is installed and runs on this device in this dtype,
    otherwise PyTorch's own (sdpa).

    Raises:
        ConfigError: the requested one cannot run here.
    """
    usable = _flash_packages(device) if dtype != torch.float32 else []
    if requested == "auto":
        return usable[0] if usable else "sdpa"
    if requested in _FLASH and requested not in usable:
        needed = f"a CUDA device of compute capability {_FLASH[requested]}.0 and its package"
    elif requested == "flex_attention" and device.type != "cuda":
        needed = "a CUDA device"
    else:
        return requested
    text = f"model.attention={requested} needs {needed}; use model.attention=auto."
    raise ConfigError(text, text)


def _flash_packages(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    capability, _ = torch.cuda.get_device_capability(device)
    found = []
    for name, needed in _FLASH.items():
        # Packages 2 and 4 share a module; transformers tells them apart.
        is_there = getattr(import_utils, f"is_{name.replace('attention', 'attn')}_available", None)
        if capability >= needed and is_there is not None and is_there():
            found.append(name)
    return found


def can_pack(attention: str) -> bool:
    """Whether an attention implementation takes packed examples without a mask of all pairs."""
    return attention in _FLASH or attention == "flex_attention"


def check_kernels(model: ModelConfig, device: torch.device) -> None:
    """Reject fused kernels that cannot run here.

    Raises:
        ConfigError: ``model.kernels=liger`` without a CUDA device or without the package.
    """
    is_there = importlib.util.find_spec("liger_kernel") is not None
    if model.kernels == "liger" and not (is_there and device.type == "cuda"):
        text = (
            "model.kernels=liger needs a CUDA device and the package: "
            "pip install 'fedllm-flwr[fast]'; use model.kernels=torch."
        )
        raise ConfigError(text, text)


def micro_batch_size(
    training: TrainingConfig, device: torch.device, num_parameters: int, rows: int = 1
) -> int:
    """Examples per forward pass, with `rows` token sequences each.

    Unless the user sets it: four sequences on a CPU, where padding costs more than a further pass,
    and for models above 0.5 B parameters, where memory is scarce; otherwise the whole batch.
    """
    if training.micro_batch_size is not None:
        return training.micro_batch_size
    small_pass = device.type == "cpu" or num_parameters > 500_000_000
    return min(4 // rows, training.batch_size) if small_pass else training.batch_size


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run with `count` CPU threads; their number can change the last bits of a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_count() -> int:
    """CUDA devices that torch can use."""
    return torch.cuda.device_count()


def check_devices(processes: int, device: torch.device) -> None:
    """Reject more processes of a client than devices of its kind; a CPU takes any number.

    Raises:
        ConfigError: names their numbers.
    """
    there = {"cuda": gpu_count(), "mps": 1}.get(device.type, processes)
    if processes > there:
        text = (
            f"federation.client_processes={processes} needs a {device.type} device for each, and "
            f"there {'is' if there == 1 else 'are'} {there}; set federation.client_processes="
            f"{there}."
        )
        raise ConfigError(text, text)


def describe_device(device: torch.device) -> str:
    """A readable description: the device's name and memory, or the number of CPUs."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return device.type
