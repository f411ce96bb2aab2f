"""The base model with its LoRA adapter, and the cache of one model per process."""

import gc
import inspect
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import LoraConfig as LoraSettings
from fedllm_flwr.config.schema import QuantizationConfig
from fedllm_flwr.errors import ConfigError, FederationError, ModelError
from fedllm_flwr.factors import core_of, cut, folded, is_core, padded, rank_of, rest
from fedllm_flwr.models.base_model import count_parameters, load_base
from fedllm_flwr.models.device import resolve_attention, resolve_device, resolve_dtype
from fedllm_flwr.models.peft_library import (
    LORA_TARGETS,
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from fedllm_flwr.models.tokenizer import load_tokenizer
from fedllm_flwr.params import Params, check_like, derive_seed

_TRAINED, _FROZEN, _SPARE = "default", "frozen", "spare"  # PEFT's names of adapters
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
    initial: Params = field(repr=False)  # initial adapter, from the seed and the LoRA settings
    most_together: int | None = None  # examples per forward pass that fit into memory, once known
    _cores: list[tuple[torch.nn.Module, RemovableHandle]] = field(default_factory=list, repr=False)

    @property
    def pad_id(self) -> int:
        """The padding token, which is masked and never contributes to a loss."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(eos if pad is None else pad)

    @cached_property
    def selects_logits(self) -> bool:
        """Whether the model can compute logits at selected positions only."""
        return "logits_to_keep" in inspect.signature(self.peft.get_base_model().forward).parameters

    @cached_property
    def takes_positions(self) -> bool:
        """Whether the model accepts ``position_ids``."""
        return "position_ids" in inspect.signature(self.peft.get_base_model().forward).parameters

    @cached_property
    def cache_name(self) -> str:
        """Name of the KV cache argument, which changed in transformers 5.24."""
        parameters = inspect.signature(self.peft.get_base_model().forward).parameters
        return "cache" if "cache" in parameters else "past_key_values"

    def params(self) -> Params:
        """A copy of the adapter's tensors as float32, by PEFT state-dict name."""
        state = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        return {
            _core_name(name): value.detach().to("cpu", torch.float32, copy=True).numpy()
            for name, value in state.items()
        }

    def load(self, params: Params, frozen: Params | None = None) -> None:
        """Replace the adapter's tensors by `params`.

        PEFT would accept any tensor of the model, including those of the frozen base. Therefore
        names and shapes must be those of the adapter that was created here, except for the rank. An
        adapter of a smaller rank is trained at that rank. The scale alpha / r is the same for all
        ranks. A core R of `params` is applied between A and B of its module: B R A x.

        Args:
            frozen: factors of any rank that are applied in addition to the adapter and not trained;
                None: the rows of A and columns of B of `params` above the adapter's rank, if any.

        Raises:
            ModelError: names, shapes or values do not fit the adapter.
        """
        rank, own = rank_of(self.initial), params
        if frozen is None and rank_of(params) > rank:
            own, frozen = cut(params, rank), rest(params, rank)
        frozen = frozen or {}
        self.check(folded(own), "the adapter")
        cores = {name: value for name, value in own.items() if is_core(name)}
        own = {name: value for name, value in own.items() if name not in cores}
        self.check_frozen(frozen)
        if not frozen and _FROZEN in self.peft.peft_config:
            self.peft.set_adapter(_TRAINED)
            self.peft.delete_adapter(_FROZEN)
        self._resize(_TRAINED, rank_of(own) or rank)
        set_peft_model_state_dict(self.peft, _tensors(own))
        self._set_cores(_tensors(cores))
        if not frozen:
            return
        self._resize(_FROZEN, rank_of(frozen))
        set_peft_model_state_dict(self.peft, _tensors(frozen), adapter_name=_FROZEN)
        self.peft.base_model.set_adapter([_TRAINED, _FROZEN])
        for name, parameter in self.peft.named_parameters():
            if f".{_FROZEN}" in name:
                parameter.requires_grad_(False)

    def _set_cores(self, cores: dict[str, torch.Tensor]) -> None:
        """Replace the current cores by these."""
        for changed, handle in self._cores:
            handle.remove()
            del changed.core
        self._cores = []
        if not cores:
            return
        found = {
            core_of(f"{name.removesuffix(f'.{_TRAINED}')}.weight"): module
            for name, module in self.peft.named_modules()
            if name.endswith(f".lora_B.{_TRAINED}")
        }
        for name, value in cores.items():
            if (module := found.get(name)) is None:
                text = f"{name}: only linear layers take a core between B and A"
                raise ModelError(f"{text}; set lora.target_modules to such.", text)
            module.core = torch.nn.Linear(len(value), len(value), False, self.device)
            module.core.weight.data = value.to(self.device)
            self._cores.append((module, module.register_forward_pre_hook(_through_core)))

    def _resize(self, adapter: str, rank: int) -> None:
        """Change the rank of one of PEFT's adapters, and keep its scale."""
        configs = self.peft.peft_config
        if adapter in configs and configs[adapter].r == rank:
            return
        own = configs[_TRAINED]
        alpha = own.lora_alpha * rank / own.r
        changes: dict[str, Any] = {"r": rank, "lora_alpha": int(alpha) if alpha % 1 == 0 else alpha}
        if adapter == _FROZEN:
            changes["lora_dropout"] = 0.0
        with torch.random.fork_rng(devices=[]):
            if adapter in configs:  # PEFT needs at least one adapter meanwhile
                self.peft.add_adapter(_SPARE, replace(own, r=1))
                self.peft.set_adapter(_SPARE)
                self.peft.delete_adapter(adapter)
            self.peft.add_adapter(adapter, replace(own, **changes))
            self.peft.set_adapter(_TRAINED)
            if _SPARE in configs:
                self.peft.delete_adapter(_SPARE)

    def check_frozen(self, frozen: Params) -> None:
        """Reject factors of modules that the adapter does not have, or with unequal ranks.

        Raises:
            ModelError: names the first such factor and the problem.
        """
        if frozen:
            like = padded(self.initial, rank_of(frozen)) if rank_of(frozen) else self.initial
            self.check(frozen, "frozen factors", like)

    def check(self, params: Params, what: str, like: Params | None = None) -> None:
        """Reject tensors with names or shapes other than the adapter's, or with NaN or infinity.

        Args:
            what: name of the tensors in the message.
            like: tensors with the expected names and shapes; None: those of the adapter, or of
                one with a smaller rank.

        Raises:
            ModelError: names the first such tensor and the problem.
        """
        rank = rank_of(params)
        if like is None:
            like = cut(self.initial, rank) if 0 < rank < rank_of(self.initial) else self.initial
        try:
            check_like(params, like)
        except FederationError as error:
            text = f"{what} does not fit the base model and the LoRA settings: {error}."
            raise ModelError(text, text) from error

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters, by the same PEFT state-dict names as `params`."""
        return {
            _state_dict_name(name): parameter
            for name, parameter in self.peft.named_parameters()
            if parameter.requires_grad
        }

    def gradient_checkpointing(self, requested: bool | None) -> bool:
        """Whether to use gradient checkpointing; by default for large models on CUDA."""
        large = self.num_base_parameters > _CHECKPOINTING_FROM
        return (self.device.type == "cuda" and large) if requested is None else requested


def _through_core(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Replace the input A x of B by R A x."""
    return (module.core(inputs[0]),)


def _core_name(name: str) -> str:
    """A core's name, which PEFT derives from the module of B to which it belongs."""
    return name.replace(f".lora_B.{_TRAINED}.core.", ".lora_R.")


def _tensors(params: Params) -> dict[str, torch.Tensor]:
    """Copies as float32 tensors."""
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in params.items()}


def _state_dict_name(name: str) -> str:
    """A parameter's name without the adapter's name; PEFT also drops DoRA's ``.weight``."""
    name = _core_name(name).replace(".default", "")
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


class ModelCache:
    """Cache of one adapted model per process, since loading a model takes seconds.

    If only the adapter's shape changes, the base model is reused. Another base model replaces the
    cached one, which is freed first.
    """

    def __init__(self) -> None:
        self._base_key: object = None
        self._adapter_key: object = None
        self._model: AdaptedModel | None = None

    def load(self, config: Config) -> AdaptedModel:
        """The base model of `config` with its adapter.

        Raises:
            ModelError, ConfigError: it cannot be loaded or adapted as asked.
        """
        device = resolve_device(config.training.device)
        dtype = resolve_dtype(config.training.dtype, device)
        attention = resolve_attention(config.model.attention, device, dtype)
        base_key = (config.model, config.quantization, device, dtype, attention)
        adapter_key = (config.lora, config.seed)
        kept, self._model = self._model, None  # a model that cannot be adapted is not cached
        if kept is not None and base_key == self._base_key:
            if adapter_key == self._adapter_key:
                self._model = kept
                return kept
            base = kept.peft.unload()
        else:
            if kept is not None:
                del kept
                gc.collect()  # the modules of a model form reference cycles
            base = load_base(config, device, dtype, attention)
        self._base_key, self._adapter_key = base_key, adapter_key
        self._model = _adapt(base, config, device, dtype, attention)
        return self._model


_process_models = ModelCache()


def load_model(config: Config) -> AdaptedModel:
    """The model of `config`, from this process's cache; see `ModelCache.load`."""
    return _process_models.load(config)


def load_beside(config: Config) -> AdaptedModel:
    """A further model, which is not cached.

    Raises:
        ModelError, ConfigError: it cannot be loaded or adapted as asked.
    """
    device = resolve_device(config.training.device)
    dtype = resolve_dtype(config.training.dtype, device)
    attention = resolve_attention(config.model.attention, device, dtype)
    return _adapt(load_base(config, device, dtype, attention), config, device, dtype, attention)


def load_dequantized(config: Config) -> AdaptedModel:
    """The quantized base model of `config`, dequantized, with a fresh adapter.

    These are the weights that the adapter was trained on, as bitsandbytes dequantizes them. The
    model is not cached.

    Raises:
        ModelError, ConfigError: it cannot be loaded or adapted as asked.
    """
    device = resolve_device(config.training.device)
    dtype = resolve_dtype(config.training.dtype, device)
    attention = resolve_attention(config.model.attention, device, dtype)
    base = load_base(config, device, dtype, attention).dequantize().to(dtype)
    full = replace(config, quantization=QuantizationConfig())
    return _adapt(base, full, device, dtype, attention)


def _adapt(
    base: Any, config: Config, device: torch.device, dtype: torch.dtype, attention: str
) -> AdaptedModel:
    """Add a fresh adapter to `base`, with random matrices from the run's seed."""
    num_parameters = count_parameters(base)
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
    """Reject a target that matches no module: PEFT ignores it if another target matches."""
    targets = config.lora.target_modules
    if isinstance(targets, str):
        return
    modules = [f".{name}" for name, _ in base.named_modules()]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in modules):
            raise _no_target(config, target)


def _no_target(config: Config, target: Any) -> ConfigError:
    text = "lora.target_modules: {} matches no layer of {} that can be adapted; use {}"
    remedy = "auto, all-linear or names of its linear layers."
    return ConfigError(
        text.format(target, f"model.path={config.model.path}", remedy),
        text.format(target, "the model", remedy),
    )


def lora_config(lora: LoraSettings, model_type: str) -> LoraConfig:
    """PEFT's configuration of the adapter.

    ``target_modules=auto`` is PEFT's default for the architecture, or all linear layers if PEFT has
    no default.
    """
    targets: Any = lora.target_modules
    if targets == "auto":
        known = LORA_TARGETS.get(model_type)
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
