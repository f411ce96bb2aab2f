"""Probes a loaded base model on a few tokens: are its logits finite, and is it causal?"""

from typing import Any

import torch

from fedllm_flwr.config import Config
from fedllm_flwr.errors import ModelError

_LENGTH = 6  # tokens of a probe
# Largest change of earlier logits if the last token changes, relative to the largest logit. Exact
# arithmetic would give 0, but quantized layers select their outliers per batch.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
_QUANTIZED_TOLERANCE = 0.2


def check_computes(model: Any, config: Config) -> None:
    """Reject a base model with non-finite weights or logits, or with non-causal attention.

    No weight may be NaN or Inf, because attention on CPUs silently ignores some of them. The model
    then gets two short texts that differ only in their last token: the logits before it must be
    finite, and the same for both.

    Raises:
        ModelError: names the model and the problem.
    """
    _check_weights(model, config)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(_LENGTH).repeat(2, 1)
    tokens[1, -1] += 1
    tokens = (tokens % vocabulary).to(model.get_input_embeddings().weight.device)
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float()
    if not torch.isfinite(logits).all():
        dtype = str(model.dtype).removeprefix("torch.")
        remedy = f"set training.dtype={'float32' if dtype != 'float32' else 'bfloat16'}"
        raise ModelError(
            f"model.path={config.model.path} gives NaN or Inf in {dtype}; {remedy} or another "
            "quantization.",
            f"its copy of the model gives NaN or Inf in {dtype}; {remedy}",
        )
    before = logits[:, :-1]  # (2, tokens before the last, vocabulary)
    change = (before[0] - before[1]).abs().max() / before.abs().max().clamp_min(1e-9)
    quantized = config.quantization.name != "none"
    if change > (_QUANTIZED_TOLERANCE if quantized else _TOLERANCE.get(model.dtype, 0.05)):
        raise both_directions(config.model.path, type(model).__name__)


def both_directions(path: str, architecture: str) -> ModelError:
    """The error for a model that sees the tokens that it should predict."""
    return ModelError(
        f"model.path={path}: {architecture} reads a text in both directions, so it would learn to "
        "copy the answer that it sees instead of writing one; give a causal language model.",
        f"its copy of the model, {architecture}, is no causal language model",
    )


def _check_weights(model: Any, config: Config) -> None:
    """Reject weights with NaN or Inf; a sum detects both in one pass and without a copy."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.detach().sum(dtype=torch.float32).isfinite():
            raise ModelError(
                f"model.path={config.model.path}: its weights hold NaN or Inf, first in {name!r}; "
                "copy or download the directory again.",
                "the weights of its copy of the model hold NaN or Inf",
            )
