"""What this package uses of PEFT, imported without PyTorch's compiler.

PEFT imports bitsandbytes, which passes a few functions to `torch.compile`. That alone imports the
compiler, 1 to 2 seconds and 40 MB in every process. Here they are compiled when they are called
first, in quantized models, with the same result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from inspect import isfunction
from typing import Any

import torch


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """Let `torch.compile` of a function return at once, and compile it in its first call."""
    compile_now: Callable[..., Any] = torch.compile

    def compile_later(model: Any = None, **settings: Any) -> Any:
        if model is None:  # used as a decorator with settings
            return partial(compile_later, **settings)
        if not isfunction(model):
            return compile_now(model, **settings)
        compiled = cache(lambda: compile_now(model, **settings))

        @wraps(model)
        def call(*arguments: Any, **named: Any) -> Any:
            return compiled()(*arguments, **named)

        return call

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = compile_now


with compiled_when_called():
    from peft import (
        LoraConfig,
        PeftModel,
        TaskType,
        get_peft_model,
        get_peft_model_state_dict,
        prepare_model_for_kbit_training,
        set_peft_model_state_dict,
    )
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

LORA_TARGETS: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
"""The layers that PEFT adapts by default, by type of model."""

__all__ = [
    "LORA_TARGETS",
    "LoraConfig",
    "PeftModel",
    "TaskType",
    "get_peft_model",
    "get_peft_model_state_dict",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]
