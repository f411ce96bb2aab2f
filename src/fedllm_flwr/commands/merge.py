"""``fedllm merge``: merge an adapter into its base model, and check the merged logits."""

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

from fedllm_flwr.commands.export import summary_of
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import QuantizationConfig
from fedllm_flwr.errors import ConfigError, FederationError, FedLLMError, ModelError
from fedllm_flwr.evaluation.central import evaluate
from fedllm_flwr.models.adapted_model import AdaptedModel, load_beside, load_dequantized
from fedllm_flwr.params import Params
from fedllm_flwr.reporting.card import model_card
from fedllm_flwr.runs.adapter_files import give_usual_mode, load_kept
from fedllm_flwr.runs.kept_adapters import KeptAdapter, check_output
from fedllm_flwr.server.preparation import evaluation_threads, held_out_records

_PROBE_SHAPE = (2, 64)  # sequences, tokens
# Maximum relative root-mean-square difference of the logits. Merging rounds every weight once more;
# measured on CPU: 1e-6 in float32 and 7e-3 in bfloat16.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class LogitDifference:
    """Difference between the logits of two models on the same tokens."""

    largest: float  # absolute
    scale: float  # largest absolute logit
    relative: float  # root mean square, relative to that of the logits

    @classmethod
    def of(cls, found: torch.Tensor, expected: torch.Tensor) -> "LogitDifference":
        """Difference between two tensors of equal shape."""
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
    """Write the base model with the adapter merged into its weights; yield progress lines.

    The written model is loaded again, and its logits are compared with those of base model plus
    adapter; if they differ, the output is removed. Tied input and output embeddings are untied if
    the adapter changes one of them.

    Args:
        output: output directory, which must not exist.
        onto: weights to merge a quantized run's adapter into: ``full`` for the base model's
            original weights, or ``quantized`` for its dequantized weights. The merged model is
            always in full precision.

    Raises:
        FedLLMError: the model cannot be loaded or written, or its logits differ.
    """
    check_output(output)
    config = kept.config
    quantization = config.quantization.name
    if onto == "quantized" and quantization == "none":
        raise ConfigError(
            "--onto quantized: the run's base model is not quantized; remove the option."
        )
    if quantization != "none" and onto == "full":
        yield (
            f"the adapter was trained on the base model in {quantization} and is merged into the "
            "base model's original weights; --onto quantized uses its dequantized "
            f"{quantization} weights"
        )
    elif quantization != "none":
        yield (
            f"the adapter is merged into the base model's dequantized {quantization} weights, on "
            "which it was trained, and written in full precision"
        )
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
        difference = _write(model, params, output, _card(kept, model))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FederationError(f"cannot write {output}: {reason}.") from error
    yield f"logits of the merged model and of base model plus adapter differ by {difference}"
    yield f"merged model written to {output}; load it with AutoModelForCausalLM.from_pretrained"


def _scores(kept: KeptAdapter, model: AdaptedModel, config: Config) -> dict[str, float] | str:
    """Scores of the adapter in `model` on the run's held-out records, or the reason for none."""
    try:
        data = held_out_records(config, model)
    except FedLLMError as error:
        return str(error)
    if data is None:
        return "the run has no held-out records"
    params = load_kept(kept, model)
    tokens = config.evaluation.batch_tokens
    return evaluate(model, params, data, tokens, evaluation_threads(config))


def _card(kept: KeptAdapter, model: AdaptedModel) -> str | None:
    """The merged model's card; None if the adapter has no run."""
    summary = summary_of(kept)
    if summary is None:
        return None
    dtype = str(model.dtype).removeprefix("torch.")
    return model_card(kept.config, summary, kept.config.model.path, dtype, merged=True)


def _write(
    model: AdaptedModel, params: Params, output: Path, card: str | None = None
) -> LogitDifference:
    """Merge, check the logits, and create the directory by one rename."""
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
        if card is not None:
            (fresh / "README.md").write_text(card, encoding="utf-8")
        give_usual_mode(fresh, like="config.json")
        merged.to("meta")  # free memory for the model that is read back
        written = AutoModelForCausalLM.from_pretrained(
            fresh,
            dtype=dtype,
            attn_implementation=attention,
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
        )
        difference = LogitDifference.of(_logits(written.eval(), device), expected)
        if not difference.relative <= _TOLERANCE[dtype]:
            raise ModelError(
                f"the merged model's logits differ from the adapted model's by {difference}; it "
                "was not written. Load base model and adapter with PEFT instead."
            )
        shutil.move(str(fresh), output)
    return difference


def _logits(model: Any, device: torch.device) -> torch.Tensor:
    """Logits on seeded random tokens; shape (2, tokens, vocabulary)."""
    text = model.config.get_text_config()
    longest = min(_PROBE_SHAPE[1], getattr(text, "max_position_embeddings", None) or 64)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(text.vocab_size, (_PROBE_SHAPE[0], longest), generator=generator)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=tokens.to(device)).logits
    return logits.float().cpu()


def _untie(peft: Any) -> None:
    """Untie input and output embeddings if the adapter changes one of them.

    Merging changes a matrix in place, so a shared matrix would change for both.
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
