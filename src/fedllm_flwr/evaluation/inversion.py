"""Gradient inversion: recovers the tokens of a batch from the adapter's gradient.

All adapted matrices of the first layer have the same input, x_t = f(token t), where f is known and
does not depend on the position (rotary embeddings come later). The gradient of a LoRA matrix A is

    dL/dA = sum_t (B^T g_t) x_t^T,

so its rows lie in the span of the inputs x_t. The attack ranks all tokens of the vocabulary by the
fraction of f(token) that lies in the span of these rows, which is one for vectors in the span. This
is the first step of DAGER (Petrov et al. 2024). Gradients of full matrices determine the span of
the inputs; those of rank-r matrices do so only for batches of few tokens.

The score: of a batch's n distinctive tokens (those in at most half of all records, which excludes
the template), the fraction among the n highest-ranked tokens. The control scores the same ranking
against the tokens of another batch, and shows what token frequency alone would achieve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedllm_flwr.config import Config
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.inputs import forward, in_dtype
from fedllm_flwr.privacy.noise import Noise
from fedllm_flwr.training.private import ExampleLosses, catching, noisy_sum

_COMMON = 0.5  # tokens in more than this fraction of records belong to the template
_RANK = 1e-4  # singular values below this fraction of the largest are rounding errors
_CHUNK = 4096  # tokens of the vocabulary per forward pass


class _ReachedError(Exception):
    """Stops a forward pass at the module whose input is needed."""


@dataclass(frozen=True)
class FirstLayer:
    """The adapted modules that read token embeddings, and their input for each token.

    Args:
        names: PEFT state-dict names of the modules' trained LoRA matrices A.
        inputs: f(token) for the whole vocabulary, with rows of norm one, (tokens, in).
    """

    names: list[str]
    inputs: Tensor


@torch.inference_mode()
def first_layer(model: AdaptedModel) -> FirstLayer:
    """The modules with the same input as the first adapted module of a forward pass."""
    layers: list[Any] = [module for module in model.peft.modules() if hasattr(module, "lora_A")]
    seen: list[tuple[Any, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: seen.append((module, args[0])))
        for layer in layers
    ]
    model.peft.eval()
    forward(model, input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))
    for hook in hooks:
        hook.remove()
    first = seen[0][1]
    together = [module for module, x in seen if x.shape == first.shape and torch.equal(x, first)]
    names = {id(parameter): name for name, parameter in model.trainable().items()}
    matrices = [module.lora_A["default"].weight for module in together]

    def stop(module: nn.Module, args: Any) -> None:
        inputs.append(args[0][:, 0].float().cpu())
        raise _ReachedError

    embeddings: Any = model.peft.get_input_embeddings()
    inputs: list[Tensor] = []
    hook = together[0].register_forward_pre_hook(stop)
    try:
        size = len(embeddings.weight)
        for start in range(0, size, _CHUNK):
            tokens = torch.arange(start, min(size, start + _CHUNK), device=model.device)[:, None]
            try:
                forward(model, input_ids=tokens)
            except _ReachedError:
                continue
    finally:
        hook.remove()
    every = torch.nn.functional.normalize(torch.cat(inputs), dim=1)
    return FirstLayer([names[id(matrix)] for matrix in matrices if id(matrix) in names], every)


def tokens_recovered(
    model: AdaptedModel,
    losses: ExampleLosses,
    records: Encoded,
    layer: FirstLayer,
    batches: Sequence[list[int]],
    config: Config,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Attack the gradient of one training step on each batch, as a client would send it.

    With ``privacy.unit=record`` this is the noisy sum of the clipped gradients, otherwise the
    gradient of the mean loss.

    Args:
        batches: at least two, of examples of `records`.

    Returns:
        Fraction of each batch's distinctive tokens recovered by the attack and by the control,
        both (batches,).
    """
    tokens_of = [set(records[i][0].tolist()) for i in range(len(records))]
    counts = np.bincount([token for each in tokens_of for token in each], minlength=1)
    common = set(np.flatnonzero(counts > _COMMON * len(records)).tolist())
    own = [set[int]().union(*(tokens_of[i] for i in batch)) - common for batch in batches]
    shares, controls = [], []
    for place, batch in enumerate(batches):
        ranking = _ranking(_gradient(model, losses, records, batch, config), layer, common)
        shares.append(_found(ranking, own[place]))
        controls.append(_found(ranking, own[(place + 1) % len(batches)]))
    return np.array(shares), np.array(controls)


def _gradient(
    model: AdaptedModel, losses: ExampleLosses, records: Encoded, batch: list[int], config: Config
) -> dict[str, Tensor]:
    parameters = model.trainable()
    model.peft.eval()
    if config.privacy.unit == "record":
        with catching(model, parameters) as rows:
            noisy, _ = noisy_sum(
                *(model, parameters, rows, losses, [batch], np.arange(len(records))),
                *(config.privacy, Noise(), 1),
            )
        return noisy
    model.peft.zero_grad()
    with in_dtype(model):
        loss = losses(batch).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.double().cpu() for name, p in parameters.items() if p.grad is not None}


def _ranking(gradient: dict[str, Tensor], layer: FirstLayer, common: set[int]) -> NDArray[np.int64]:
    """All tokens except the common ones, ranked from most to least likely."""
    rows = torch.cat([gradient[name] for name in layer.names])  # (modules x r, in)
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis[sizes > _RANK * sizes[0]].float()
    inside = (layer.inputs @ basis.T).square().sum(1).numpy()
    inside[list(common)] = -1.0
    return np.argsort(-inside, kind="stable")[: len(inside) - len(common)]


def _found(ranking: NDArray[np.int64], own: set[int]) -> float:
    return len(own.intersection(ranking[: len(own)].tolist())) / max(1, len(own))
