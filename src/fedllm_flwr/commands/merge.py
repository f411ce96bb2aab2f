"""The base model with an adapter merged into its weights, checked before it is handed out."""

import gc
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import QuantizationConfig
from fedllm_flwr.errors import ConfigError, FederationError, FedLLMError, ModelError
from fedllm_flwr.evaluation.central import evaluate
from fedllm_flwr.models.adapted_model import AdaptedModel, load_beside, load_dequantized
from fedllm_flwr.params import Params
from fedllm_flwr.runs.adapter_files import give_usual_mode, load_kept
from fedllm_flwr.runs.kept_adapters import KeptAdapter, check_output
from fedllm_flwr.server.preparation import evaluation_threads, held_out_records

ONTO = ("full", "quantized")  # base weights that a quantized run's adapter may go into

_PROBE_SHAPE = (2, 64)  # sequences, tokens
# Largest root-mean-square difference of the logits, as a share of the logits' own. Merging rounds
# every weight once more; measured on CPU: 1e-6 in float32, 7e-3 in bfloat16.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Difference:
    """How the logits of two models differ on the probe.

    ``largest`` and ``scale`` are the largest absolute difference and logit, ``relative`` the
    root-mean-square difference as a share of the root-mean-square logit.
    """

    largest: float
    scale: float
    relative: float

    @classmethod
    def of(cls, found: torch.Tensor, expected: torch.Tensor) -> "Difference":
        """Of logits of one shape."""
        difference = (found - expected).float()
        norm = float(expected.float().norm())
        return cls(
            largest=float(difference.abs().max()),
            scale=float(expected.abs().max()),
            relative=float(difference.norm()) / max(norm, 1e-12),
        )

    def __str__(self) -> str:
        return f"{self.largest:.1e} at most, of logits up to {self.scale:.1f}"


def merge(kept: KeptAdapter, output: Path, onto: str = "full") -> Iterator[str]:
    """Write the base model with an adapter in its weights; yields lines on what was done.

    The merged model is loaded again from what was written, and its logits are compared with those
    of base model and adapter side by side: one that differs is refused, and nothing is left. A
    model whose input and output embeddings are one matrix gets two where the adapter changes
    either.

    Args:
        output: a directory that does not exist.
        onto: for a quantized run ``full``, the base model's own weights, or ``quantized``, what
            quantization had made of them, in full precision again. The result is never quantized.

    Raises:
        FedLLMError: the model cannot be loaded, written, or differs.
    """
    check_output(output)
    config = kept.config
    quantization = config.quantization.name
    if onto == "quantized" and quantization == "none":
        raise ConfigError("--onto quantized: the run's base model is not quantized; drop it.")
    if quantization != "none":
        yield from _about_quantized(config, onto)
    full = replace(config, quantization=QuantizationConfig())
    trained = _scores(kept, load_beside(config), config) if quantization != "none" else None
    gc.collect()
    model = load_dequantized(config) if onto == "quantized" else load_beside(full)
    params = load_kept(kept, model)
    if isinstance(trained, dict):
        merged = _scores(kept, model, full)
        assert isinstance(merged, dict)
        for name in [name for name in ("loss", "accuracy") if name in trained]:
            yield (
                f"{name} on held-out records: {trained[name]:.4f} as trained ({quantization}), "
                f"{merged[name]:.4f} merged"
            )
    elif trained is not None:
        yield f"the loss on both was not compared: {trained}"
    try:
        difference = _write(model, params, output)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FederationError(f"cannot write {output}: {reason}.") from error
    yield f"logits of the merged model and of base and adapter differ by {difference}"
    yield f"merged model written to {output}; load it with AutoModelForCausalLM.from_pretrained"


def _about_quantized(config: Config, onto: str) -> Iterator[str]:
    name = config.quantization.name
    if onto == "full":
        yield (
            f"the adapter was trained on the base model in {name}, and is merged into the base "
            f"model's own weights; --onto quantized takes those that {name} had made of them"
        )
    else:
        yield (
            f"the adapter is merged into what {name} had made of the base model's weights, as it "
            "was trained; they are written in full precision"
        )


def _scores(kept: KeptAdapter, model: AdaptedModel, config: Config) -> dict[str, float] | str:
    """Scores of the adapter in `model` on the run's held-out records, or why there are none."""
    try:
        data = held_out_records(config, model)
    except FedLLMError as error:
        return str(error)
    if data is None:
        return "the run has no held-out records"
    params = load_kept(kept, model)
    tokens = config.evaluation.batch_tokens
    return evaluate(model, params, data, tokens, evaluation_threads(config))


def _write(model: AdaptedModel, params: Params, output: Path) -> Difference:
    """Merge and write; the directory appears as a whole, once its logits are right."""
    model.load(params)
    model.peft.eval()
    expected = _logits(model.peft, model.device)
    attention, device, dtype = model.attention, model.device, model.dtype
    _untie(model.peft)
    merged: Any = model.peft.merge_and_unload()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        fresh = Path(folder) / output.name
        merged.save_pretrained(str(fresh), safe_serialization=True)
        model.tokenizer.save_pretrained(str(fresh))
        give_usual_mode(fresh, like="config.json")
        merged.to("meta")  # room for the one that is read back
        written = AutoModelForCausalLM.from_pretrained(
            fresh,
            dtype=dtype,
            attn_implementation=attention,
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
        )
        difference = Difference.of(_logits(written.eval(), device), expected)
        if not difference.relative <= _TOLERANCE[dtype]:
            raise ModelError(
                f"the merged model is not the adapted one, its logits differ by {difference}; it "
                "was not written. Load base model and adapter with PEFT instead."
            )
        shutil.move(str(fresh), output)
    return difference


def _logits(model: Any, device: torch.device) -> torch.Tensor:
    """On random tokens, the same for every model of one vocabulary; (2, tokens, vocabulary)."""
    text = model.config.get_text_config()
    longest = min(_PROBE_SHAPE[1], getattr(text, "max_position_embeddings", None) or 64)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(text.vocab_size, (_PROBE_SHAPE[0], longest), generator=generator)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=tokens.to(device)).logits
    return logits.float().cpu()


def _untie(peft: Any) -> None:
    """Give input and output embeddings a matrix each, where they share one that is adapted.

    Merging changes a matrix in place: shared, the change of one side would reach the other.
    """
    base = peft.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if None in ends or not any(hasattr(end, "base_layer") for end in ends):
        return
    first, second = (getattr(end, "base_layer", end) for end in ends)
    if first.weight is not second.weight:
        return
    second.weight = torch.nn.Parameter(first.weight.detach().clone(), requires_grad=False)
    for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
        config.tie_word_embeddings = False
