"""Inputs of a forward pass from token sequences: batches by length, padding and positions."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.data.tokens import TokenArray
from fedllm_flwr.models.adapted_model import AdaptedModel

IGNORED = -100  # transformers' label of tokens that do not contribute to the loss


def by_length(lengths: NDArray[np.int64], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of example indices, longest first, each at most `batch_tokens` when padded."""
    order = np.argsort(-lengths, kind="stable").tolist()
    while order:
        size = max(1, batch_tokens // int(lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def forward(model: AdaptedModel, **inputs: Any) -> Any:
    """A forward pass in the model's dtype."""
    with in_dtype(model):
        return model.peft(**inputs)


def in_dtype(model: AdaptedModel) -> torch.autocast:
    """Context in which the model computes in its own dtype."""
    narrow = model.dtype != torch.float32
    return torch.autocast(model.device.type, dtype=model.dtype, enabled=narrow)


def left_padded(
    prompts: Sequence[TokenArray], model: AdaptedModel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask on the model's device, both (prompts, longest).

    The padding is on the left, so that all continuations start at the same position.
    """
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.full((len(prompts), longest), model.pad_id, np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(tokens).to(model.device), torch.from_numpy(mask).to(model.device)


def positions(model: AdaptedModel, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """``position_ids`` that start at the first real token, if the model accepts them."""
    if not model.takes_positions:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def collate_padded(examples: Encoded, batch: list[int], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, each (examples, longest), padded on the right."""
    shape = (len(batch), int(examples.lengths[batch].max()))
    input_ids = np.full(shape, pad_id, np.int64)
    mask = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    for row, index in enumerate(batch):
        tokens, supervised = examples[index]
        input_ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = np.where(supervised, tokens, IGNORED)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
    }


def collate_packed(examples: Encoded, batch: list[int]) -> dict[str, torch.Tensor]:
    """input_ids, position_ids and labels, each (1, tokens): examples packed without padding.

    Positions restart with each example, by which attention separates the examples. The first token
    of an example is not a label, because the token before it belongs to another example.
    """
    tokens, supervised = zip(*(examples[index] for index in batch), strict=True)
    places = np.concatenate([np.arange(len(example)) for example in tokens])
    joined = np.concatenate(tokens).astype(np.int64)
    is_label = np.concatenate(supervised) & (places > 0)
    return {
        "input_ids": torch.from_numpy(joined[None]),
        "position_ids": torch.from_numpy(places[None].astype(np.int64)),
        "labels": torch.from_numpy(np.where(is_label, joined, IGNORED)[None]),
    }


def needed_logits(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch with logits only at the positions that have a label.

    The projection to the vocabulary is a large part of a small model's computation, and its output
    is the largest tensor of a large model. ``logits_to_keep`` (kept,) are the positions at which
    any row has a supervised next token; ``shift_labels`` (rows, kept) are those tokens.
    """
    labels = inputs["labels"]
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    kept = (following != IGNORED).any(0).nonzero()[:, 0]
    wanted = following[:, kept].contiguous()
    return {**inputs, "logits_to_keep": kept, "shift_labels": wanted, "labels": wanted}
