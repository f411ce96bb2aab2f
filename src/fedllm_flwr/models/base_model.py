"""The frozen base model: loading and quantization."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import QuantizationConfig
from fedllm_flwr.errors import ModelError
from fedllm_flwr.models.device import check_kernels
from fedllm_flwr.models.peft_library import prepare_model_for_kbit_training
from fedllm_flwr.models.probe import check_computes
from fedllm_flwr.models.tokenizer import model_source, unusable_model

transformers_logging.disable_progress_bar()


def load_base(config: Config, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    """The frozen base model on its device, in eval mode.

    Raises:
        ModelError: it cannot be loaded, its weights do not match its config.json, or it is not a
            causal language model.
    """
    check_kernels(config.model, device)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_source(config.model),
            revision=config.model.revision,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=_quantization(config.quantization, dtype),
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and rejected below
        )
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds; all mean that it is unusable
        raise unusable_model(config.model, "weights", error) from error
    model, report = loaded
    _check_complete(config, report)
    model.config.use_cache = False
    if config.model.kernels == "liger":
        _fuse(model, config)
    if config.quantization.name != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        _keep_weights(model)
    check_computes(model, config)
    return model


def _fuse(model: Any, config: Config) -> None:
    """Replace norms, rotary positions and MLPs by Liger's fused kernels; losses stay PyTorch's.

    Raises:
        ModelError: Liger has no kernels for this architecture.
    """
    from liger_kernel.transformers import monkey_patch

    if model.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(
            f"model.kernels=liger has no kernels for {model.config.model_type} models "
            f"(model.path={config.model.path}); use model.kernels=torch."
        )
    monkey_patch._apply_liger_kernel_to_instance(
        model, cross_entropy=False, fused_linear_cross_entropy=False
    )


def _keep_weights(model: Any) -> None:
    """Prevent bitsandbytes from repacking 4-bit weights at the first evaluation on some CPUs.

    On CPUs with AVX512-BF16, repacking permanently rounds the scales to bfloat16, so training would
    depend on what the process evaluated before. It also fails for widths that are not a multiple of
    64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _check_complete(config: Config, report: dict[str, Any]) -> None:
    """Reject missing or misshapen weights, which transformers would replace by random ones."""
    wrong = {name: "has another shape" for name, *_ in report["mismatched_keys"]}
    wrong |= dict.fromkeys(report["missing_keys"], "is missing")
    if wrong:
        name = min(wrong)
        raise ModelError(
            f"model.path={config.model.path}: the weights are not those of its config.json, "
            f"{name!r} {wrong[name]} ({len(wrong)} tensors in all); copy or download the "
            "directory again."
        )


def _quantization(quantization: QuantizationConfig, dtype: torch.dtype) -> Any:
    if quantization.name == "none":
        return None
    if quantization.name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = quantization.compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization.double_quantization,
        bnb_4bit_compute_dtype=dtype if compute == "auto" else getattr(torch, compute),
    )


def count_parameters(model: Any) -> int:
    """Number of parameters of the base model; packed 4-bit weights are counted unpacked."""
    total = 0
    for parameter in model.parameters():
        quantized_shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        total += quantized_shape.numel() if quantized_shape is not None else parameter.numel()
    return total
