"""Log-probabilities of answers, batched by length to a token budget."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.training.batches import IGNORED, collate_padded, needed_logits


@torch.inference_mode()
def answer_log_probs(
    model: AdaptedModel, examples: Encoded, batch_tokens: int
) -> NDArray[np.float32]:
    """Sum of the log-probabilities (nats) of each example's supervised tokens, (examples,)."""
    model.peft.eval()
    sums = np.zeros(len(examples), np.float32)
    for batch in by_length(examples.lengths, batch_tokens):
        inputs = collate_padded(examples, batch, model.pad_id)
        if model.selects_logits:
            inputs = needed_logits(inputs)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        labels = inputs.pop("labels")
        wanted = inputs.pop("shift_labels", labels[:, 1:])
        logits = forward(model, use_cache=False, **inputs).logits[:, : wanted.shape[1]]
        sums[batch] = token_log_probs(logits, wanted).sum(1).cpu().numpy()
    return sums


def token_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) at each position, (rows, positions); zero where the target is `IGNORED`."""
    flat = cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -flat.view_as(targets)


def forward(model: AdaptedModel, **inputs: Any) -> Any:
    """A forward pass in the model's dtype."""
    narrow = model.dtype != torch.float32
    with torch.autocast(model.device.type, dtype=model.dtype, enabled=narrow):
        return model.peft(**inputs)


def by_length(lengths: NDArray[np.int64], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of example indices, longest first, each at most `batch_tokens` when padded."""
    order = np.argsort(-lengths, kind="stable").tolist()
    while order:
        size = max(1, batch_tokens // int(lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def share_above_zero(values: NDArray[np.float64]) -> float:
    """Share of the margins above zero, ties counting half: equal rewards prefer neither answer."""
    return float(np.mean(0.5 + 0.5 * np.sign(values)))
