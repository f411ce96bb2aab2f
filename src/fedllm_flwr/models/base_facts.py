"""Facts about a base model from its files, without loading its weights."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedllm_flwr.config.names import did_you_mean
from fedllm_flwr.config.schema import LoraConfig, ModelConfig
from fedllm_flwr.errors import ConfigError, ModelError
from fedllm_flwr.models.probe import both_directions
from fedllm_flwr.models.tokenizer import NEEDED, model_source, unusable_model

_CONTEXT_NAMES = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")
_MOST_NAMED = 12


@dataclass(frozen=True)
class BaseFacts:
    """Sizes and layers of a base model, from its config.json."""

    path: str  # as the user gives it
    model_type: str
    context: int | None  # maximum length in tokens; None: unlimited
    vocabulary: int  # rows of the input embedding
    layers: dict[str, int]  # adaptable layers -> the smaller of input and output width
    output_layer: str | None  # its name; excluded from all-linear

    def targets(self, lora: LoraConfig) -> dict[str, int]:
        """The layers that ``lora.target_modules`` adapts, with their widths.

        Raises:
            ConfigError: a target matches no such layer.
        """
        names = lora.target_modules
        if names == "auto":
            # Importing PEFT takes seconds, which a wrong command should not have to wait for.
            from fedllm_flwr.models.peft_library import LORA_TARGETS

            known = LORA_TARGETS.get(self.model_type)
            names = sorted(known) if known else "all-linear"
        if names == "all-linear":
            return {name: w for name, w in self.layers.items() if name != self.output_layer}
        for name in names:
            if not any(_is_called(layer, name) for layer in self.layers):
                raise self._no_target(name)
        return {
            layer: width
            for layer, width in self.layers.items()
            if any(_is_called(layer, name) for name in names)
        }

    def _no_target(self, name: str) -> ConfigError:
        leaves = sorted({layer.rpartition(".")[2] for layer in self.layers})
        hint = did_you_mean(name, leaves, cutoff=0.6)
        more = ", ..." if len(leaves) > _MOST_NAMED else ""
        return ConfigError(
            f"lora.target_modules: {name} matches no layer of model.path={self.path} that can be "
            f"adapted.{hint} Use auto, all-linear or names of its layers: "
            f"{', '.join(leaves[:_MOST_NAMED])}{more}.",
            f"lora.target_modules: {name} matches no layer of the model that can be adapted",
        )


def _is_called(layer: str, name: str) -> bool:
    return f".{layer}".endswith(f".{name}")


@lru_cache(maxsize=4)
def base_facts(model: "ModelKey") -> BaseFacts:
    """Facts about a base model; its files are inspected, but its weights are not read.

    Raises:
        ModelError: files are missing or truncated, or it is not a causal language model.
    """
    settings = model.config
    source = model_source(settings)
    try:
        skeleton = _skeleton(source, settings.revision)
    except Exception as error:  # transformers raises many kinds; all mean that it is unusable
        raise unusable_model(settings, "weights", error) from error
    _check_directions(settings.path, skeleton)
    if Path(source).is_dir():
        _check_files(settings, Path(source), skeleton)
    embedding, output = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    names = {module: name for name, module in skeleton.named_modules()}
    return BaseFacts(
        path=settings.path,
        model_type=skeleton.config.model_type,
        context=_context(skeleton.config),
        vocabulary=embedding.weight.shape[0],
        layers={name: width for module, name in names.items() if (width := _width(module))},
        output_layer=names.get(output),
    )


@dataclass(frozen=True)
class ModelKey:
    """A model's settings as a cache key."""

    text: str
    config: ModelConfig

    @classmethod
    def of(cls, model: ModelConfig) -> "ModelKey":
        """The key for the settings."""
        return cls(repr(model), model)

    def __hash__(self) -> int:
        return hash(self.text)


def _skeleton(source: str, revision: str | None) -> Any:
    """The model without weights: its modules on torch's meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _context(config: Any) -> int | None:
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _CONTEXT_NAMES)
    return next((int(value) for value in found if isinstance(value, int) and value > 0), None)


def _check_directions(path: str, skeleton: Any) -> None:
    """Reject encoders: transformers' attention modules declare whether they are causal."""
    said = [module.is_causal for module in skeleton.modules() if hasattr(module, "is_causal")]
    if said and not any(said):
        raise both_directions(path, type(skeleton).__name__)


def _width(module: Any) -> int:
    """The smaller of a layer's input and output widths; 0 if the layer cannot be adapted."""
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    return min(module.weight.shape) if isinstance(module, kinds) else 0


def _check_files(model: ModelConfig, folder: Path, skeleton: Any) -> None:
    """Reject weight files that are missing, truncated or of another model."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, OSError) as error:
            raise ModelError(
                f"model.path={model.path}: {index.name} cannot be read ({error}); copy or "
                "download the directory again."
            ) from error
        files = [folder / name for name in shards]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"model.path={model.path}: no *.safetensors there; give the directory of a Hugging "
            f"Face causal language model with {NEEDED['weights']}."
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    is_packed = getattr(skeleton.config, "quantization_config", None) is not None
    for file in files:
        try:
            with safe_open(str(file), framework="numpy") as opened:
                found = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"model.path={model.path}: {file.name} cannot be read ({error}); copy or download "
                "the directory again."
            ) from error
        for name, shape in found.items():
            if not is_packed and shapes.get(name, tuple(shape)) != tuple(shape):
                raise ModelError(
                    f"model.path={model.path}: the weights are not those of its config.json, "
                    f"{name!r} has shape {tuple(shape)}, expected {shapes[name]}; copy or download "
                    "the directory again."
                )
