"""Device, precision and attention implementation of a model, with defaults per device."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedllm_flwr.config.schema import TrainingConfig
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


def resolve_attention(requested: str, device: torch.device) -> str:
    """The attention implementation of ``model.attention``; auto prefers FlashAttention on CUDA.

    Raises:
        ConfigError: FlashAttention is requested but cannot run here.
    """
    has_flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    if requested == "auto":
        return "flash_attention_2" if has_flash else "sdpa"
    if requested == "flash_attention_2" and not has_flash:
        text = (
            "model.attention=flash_attention_2 needs a CUDA device and the flash-attn package; "
            "use model.attention=auto."
        )
        raise ConfigError(text, text)
    return requested


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


def describe_device(device: torch.device) -> str:
    """A readable description: the device's name and memory, or the number of CPUs."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return device.type
