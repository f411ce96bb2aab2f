"""The frozen base model, loaded once per process, and the LoRA adapter that is swapped into it."""

import gc
import importlib.util
import inspect
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
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
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import LoraConfig as LoraSettings
from fedllm_flwr.config.schema import QuantizationConfig
from fedllm_flwr.errors import ConfigError, ModelError
from fedllm_flwr.params import Params, derive_seed
from fedllm_flwr.training.device import resolve_device, resolve_dtype
from fedllm_flwr.training.tokenizer import load_tokenizer, model_source, unusable_model

transformers_logging.disable_progress_bar()

_CHECKPOINTING_FROM = 1_000_000_000  # parameters, on CUDA


@dataclass
class AdaptedModel:
    """A base model with one adapter in it, on its device."""

    peft: PeftModel
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    attention: str
    num_base_parameters: int
    quantized: bool
    initial: Params = field(repr=False)  # the adapter as it was made, by (seed, LoRA settings)

    @property
    def pad_id(self) -> int:
        """A token to fill up batches with; it is masked and never enters a loss."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(eos if pad is None else pad)

    @cached_property
    def selects_logits(self) -> bool:
        """Whether the model can compute logits at chosen positions only."""
        return "logits_to_keep" in inspect.signature(self.peft.get_base_model().forward).parameters

    def params(self) -> Params:
        """A copy of the adapter's tensors as float32, by PEFT state-dict name."""
        state = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        return {
            name: value.detach().to("cpu", torch.float32, copy=True).numpy()
            for name, value in state.items()
        }

    def load(self, params: Params) -> None:
        """Put `params` in the place of the adapter's tensors.

        Raises:
            ModelError: names or shapes that are not the adapter's.
        """
        tensors = {name: torch.from_numpy(value.copy()) for name, value in params.items()}
        self._check_shapes(params)
        result = set_peft_model_state_dict(self.peft, tensors)
        missing = [name for name in result.missing_keys if "lora_" in name]
        if result.unexpected_keys or missing:
            name = [*result.unexpected_keys, *missing][0]
            raise ModelError(
                f"the adapter does not fit the base model and the LoRA settings: {name!r} is "
                f"{'missing' if missing else 'unknown'}."
            )

    def _check_shapes(self, params: Params) -> None:
        for name, value in params.items():
            expected = self.initial[name].shape if name in self.initial else value.shape
            if value.shape != expected:
                raise ModelError(
                    f"the adapter does not fit the base model and the LoRA settings: {name!r} has "
                    f"shape {value.shape}, expected {expected}."
                )

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters by PEFT state-dict name, as `params` names them."""
        return {
            _state_dict_name(name): parameter
            for name, parameter in self.peft.named_parameters()
            if parameter.requires_grad
        }

    def gradient_checkpointing(self, requested: bool | None) -> bool:
        """Whether to recompute activations: automatic for large models on CUDA."""
        large = self.num_base_parameters > _CHECKPOINTING_FROM
        return (self.device.type == "cuda" and large) if requested is None else requested


def _state_dict_name(name: str) -> str:
    """A parameter's name without the adapter's; PEFT also leaves off DoRA's ``.weight``."""
    name = name.replace(".default", "")
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


@dataclass
class _Held:
    """The model that this process keeps, and what it was made from."""

    base_key: str
    adapter_key: str
    model: AdaptedModel


_held: _Held | None = None


def load_model(config: Config) -> AdaptedModel:
    """The base model of `config` with its adapter; kept for the next call of this process.

    One model is held: another base replaces it, another adapter shape is put into the same base.

    Raises:
        ModelError, ConfigError: it cannot be loaded or adapted as asked.
    """
    global _held
    device = resolve_device(config.training.device)
    dtype = resolve_dtype(config.training.dtype, device)
    attention = _attention(config.model.attention, device)
    base_key = repr((config.model, config.quantization, device, dtype, attention))
    adapter_key = repr((config.lora, config.seed))
    base: Any = None
    if _held is not None:
        if (_held.base_key, _held.adapter_key) == (base_key, adapter_key):
            return _held.model
        if _held.base_key == base_key:
            base = _held.model.peft.unload()
            del base.peft_config  # else PEFT takes the next adapter for a second one
        _held = None
        gc.unfreeze()
        gc.collect()
    if base is None:
        base = _load_base(config, device, dtype, attention)
    model = _adapt(base, config, device, dtype, attention)
    _held = _Held(base_key, adapter_key, model)
    # Each Trainer starts with a full collection: half a second if it has to walk through all that
    # the libraries made at import, a few milliseconds if that is out of its sight.
    gc.collect()
    gc.freeze()
    return model


def _adapt(
    base: Any, config: Config, device: torch.device, dtype: torch.dtype, attention: str
) -> AdaptedModel:
    """Put a fresh adapter into `base`, its random matrices drawn from the run's seed."""
    num_parameters = _count_parameters(base)
    _check_targets(config, base)
    settings = lora_config(config.lora, base.config.model_type)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "adapter"))
            peft_model = get_peft_model(base, settings)
    except ValueError as error:  # PEFT: no module of the model has such a name
        raise _no_target(config, config.lora.target_modules) from error
    model = AdaptedModel(
        peft=peft_model,
        tokenizer=load_tokenizer(config.model),
        device=device,
        dtype=dtype,
        attention=attention,
        num_base_parameters=num_parameters,
        quantized=config.quantization.name != "none",
        initial={},
    )
    model.initial = model.params()
    return model


def _check_targets(config: Config, base: Any) -> None:
    """Refuse a name that no module has: PEFT passes over it where another one matches."""
    targets = config.lora.target_modules
    if isinstance(targets, str):
        return
    modules = [f".{name}" for name, _ in base.named_modules()]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in modules):
            raise _no_target(config, target)


def _no_target(config: Config, target: Any) -> ConfigError:
    return ConfigError(
        f"lora.target_modules: {target} matches no layer of model.path={config.model.path} that "
        "can be adapted; use auto, all-linear or names of its linear layers."
    )


def lora_config(lora: LoraSettings, model_type: str) -> LoraConfig:
    """PEFT's configuration of the adapter.

    ``target_modules=auto`` is PEFT's choice for the architecture, all linear layers where it has
    none.
    """
    targets: Any = lora.target_modules
    if targets == "auto":
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
        targets = sorted(known) if known else "all-linear"
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type=TaskType.CAUSAL_LM,
    )


def _load_base(config: Config, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    source = model_source(config.model)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            revision=config.model.revision,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=_quantization(config.quantization, dtype),
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds; all mean that it is unusable
        raise unusable_model(config.model, "weights", error) from error
    if report["missing_keys"]:  # transformers would go on with random values
        raise ModelError(
            f"model.path={config.model.path}: its weights lack {min(report['missing_keys'])!r} "
            f"({len(report['missing_keys'])} tensors in all), which its config.json asks for; "
            "copy or download the directory again."
        )
    model.config.use_cache = False
    if config.quantization.name != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


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


def _attention(requested: str, device: torch.device) -> str:
    has_flash = importlib.util.find_spec("flash_attn") is not None and device.type == "cuda"
    if requested == "auto":
        return "flash_attention_2" if has_flash else "sdpa"
    if requested == "flash_attention_2" and not has_flash:
        raise ConfigError(
            "model.attention=flash_attention_2 needs a CUDA device and the flash-attn package; "
            "use model.attention=auto."
        )
    return requested


def _count_parameters(model: Any) -> int:
    """Parameters of the base model; packed 4-bit weights count as what they stand for."""
    total = 0
    for parameter in model.parameters():
        quantized_shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        total += quantized_shape.numel() if quantized_shape is not None else parameter.numel()
    return total
