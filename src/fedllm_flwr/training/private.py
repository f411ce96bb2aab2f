"""DP-SGD on the adapter's matrices: local training that is differentially private per record.

Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1. In every optimizer step

1. each of the client's records is drawn independently with probability q = B / n, where B is
   ``training.batch_size x gradient_accumulation_steps`` and n the client's announced number of
   examples; the draw is secret, and a step is taken even if it is empty;
2. each record's gradient over all trained matrices is clipped as one vector to C =
   ``privacy.clip``; the examples made of one record (both answers of a pair, all turns of a chat)
   count as one;
3. the step's gradient is (sum of the clipped gradients + z C N(0, I)) / B, with z =
   ``privacy.noise_multiplier`` and the client's own secret noise (`privacy.noise`).

Everything after that is post-processing: clipping by ``training.max_grad_norm``, the proximal term,
SCAFFOLD's c - c_i (c_i is a function of this client's noisy gradients, and c of released values),
the optimizer, and everything that the client sends or keeps.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import PrivacyConfig
from fedllm_flwr.errors import ModelError, NotFiniteError
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.device import micro_batch_size
from fedllm_flwr.models.inputs import in_dtype
from fedllm_flwr.privacy.noise import Noise
from fedllm_flwr.training.batches import MicroBatch, RoundBatches
from fedllm_flwr.training.trainer import Penalty, Trained, without_dropout
from fedllm_flwr.training.trainer_library import TrainerCallback

ExampleLosses = Callable[[MicroBatch], Tensor]
"""Loss of each example of a micro-batch, (examples,), independent of the other examples."""
PerExample = dict[str, Tensor]
"""Gradients by tensor name, (examples, out, in), float32."""

_BELOW = 1 - 1e-6  # keeps a clipped gradient's norm below the bound in float32


def poisson_batches(
    source: NDArray[np.int64], lengths: NDArray[np.int64], steps: int, batch_size: int
) -> RoundBatches:
    """The examples of each step, from a Poisson sample of the records.

    Args:
        source: index of the record of each example, (examples,).
        lengths: tokens of each example, (examples,).
        batch_size: B, in examples.
    """
    share, noise = min(1.0, batch_size / len(source)), Noise()
    records, record_of = np.unique(source, return_inverse=True)
    longest = np.zeros(len(records), np.int64)
    np.maximum.at(longest, record_of, lengths)
    order = np.lexsort((record_of, longest[record_of]))  # alike in length, and a record together
    drawn = [
        order[np.isin(record_of[order], noise.poisson_sample(len(records), share))]
        for _ in range(steps)
    ]
    tokens = sum(int(lengths[step].sum()) for step in drawn)
    return RoundBatches([step.tolist() for step in drawn], 1, batch_size, tokens, tokens)


def train_privately(
    model: AdaptedModel,
    parameters: dict[str, nn.Parameter],
    losses: ExampleLosses,
    source: NDArray[np.int64],
    batches: RoundBatches,
    config: Config,
    learning_rate: float,
    seed: int,
    rows_per_example: int,
    drops_out: bool,
    callbacks: Sequence[TrainerCallback],
    penalty: Penalty,
) -> Trained:
    """Train the adapter in place; one optimizer step for each entry of `batches`.

    Args:
        parameters: the matrices to train, by PEFT name.
        source: index of the record of each example, (examples,).
        seed: seed of dropout, which is not secret.

    Raises:
        ModelError: the model mixes the rows of a batch, so there are no per-record gradients.
        NotFiniteError: a record's gradient is NaN or infinite.
    """
    training, privacy = config.training, config.privacy
    assert privacy.noise_multiplier is not None  # the server has calibrated it
    size = micro_batch_size(training, model.device, model.num_base_parameters, rows_per_example)
    kind = torch.optim.SGD if training.optimizer == "sgd" else torch.optim.AdamW
    optimizer = kind(parameters.values(), lr=learning_rate, weight_decay=training.weight_decay)
    arguments: Any = SimpleNamespace(fp16=False)  # what `DriftCorrection` asks for
    nothing: Any = None
    noise, total, seen = Noise(), 0.0, 0
    torch.manual_seed(seed)
    model.peft.train()
    with (
        nullcontext() if drops_out else without_dropout(model.peft),
        _checkpointing(model, training.gradient_checkpointing),
        catching(model, parameters) as rows,
    ):
        for step in batches.batches:
            parts = _micro_batches(step, source, size)
            noisy, loss = noisy_sum(
                model, parameters, rows, losses, parts, source, privacy, noise, rows_per_example
            )
            total, seen = total + loss, seen + len(step)
            for name, parameter in parameters.items():
                parameter.grad = (noisy[name] / batches.items_per_step).to(parameter)
            if (term := penalty()) is not None:
                term.backward()  # type: ignore[no-untyped-call]
            if training.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters.values(), training.max_grad_norm)
            for callback in callbacks:
                callback.on_pre_optimizer_step(arguments, nothing, nothing)
            optimizer.step()
            for callback in callbacks:
                callback.on_optimizer_step(arguments, nothing, nothing)
            optimizer.zero_grad()
    return Trained(total / max(1, seen), len(batches))


def noisy_sum(
    model: AdaptedModel,
    parameters: dict[str, nn.Parameter],
    rows: "Rows",
    losses: ExampleLosses,
    batches: Iterable[MicroBatch],
    source: NDArray[np.int64],
    privacy: PrivacyConfig,
    noise: Noise,
    rows_per_example: int,
) -> tuple[dict[str, Tensor], float]:
    """The release of a step: the clipped gradients of its records plus noise, summed in float64.

    Args:
        batches: the step's examples; all examples of a record are in one batch.

    Returns:
        The sums by tensor name, on the CPU; and the sum of the losses, which is not private.
    """
    assert privacy.noise_multiplier is not None
    deviation, total = privacy.noise_multiplier * privacy.clip, 0.0
    sums = {name: torch.zeros_like(p, dtype=torch.float) for name, p in parameters.items()}
    for batch in batches:
        values, gradients = per_example(model, rows, losses, batch, rows_per_example)
        add_clipped(sums, gradients, source[batch], privacy.clip)
        total += float(values.sum())
    noisy = {name: value.double().cpu() for name, value in sums.items()}
    if deviation:
        for value in noisy.values():
            value += deviation * torch.from_numpy(noise.normal(tuple(value.shape)))
    return noisy, total


@dataclass
class Rows:
    """The result of a backward pass: the gradient of each row, (rows, out, in), by tensor name."""

    expected: int = 0  # rows of the forward pass
    gradients: dict[str, Tensor] = field(default_factory=dict)


def per_example(
    model: AdaptedModel, rows: Rows, losses: ExampleLosses, batch: MicroBatch, rows_per_example: int
) -> tuple[Tensor, PerExample]:
    """The loss of each example, (examples,), and its gradient for each captured matrix.

    The forward pass has the first rows of all examples, followed by their second rows.

    Raises:
        ModelError: as in `train_privately`.
    """
    rows.expected, rows.gradients = rows_per_example * len(batch), {}
    with in_dtype(model):
        values = losses(batch)
    values.sum().backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: value.view(rows_per_example, len(batch), *value.shape[1:]).sum(0)
        for name, value in rows.gradients.items()
    }
    return values.detach(), gradients


def add_clipped(
    sums: dict[str, Tensor], gradients: PerExample, record_of: NDArray[np.int64], bound: float
) -> None:
    """Add to `sums` the gradient of each record, scaled to an L2 norm of at most `bound`.

    Args:
        record_of: the record of each example, (examples,); gradients are summed per record.

    Raises:
        NotFiniteError: a norm is NaN or infinite.
    """
    records, inverse = np.unique(record_of, return_inverse=True)
    device = next(iter(gradients.values())).device
    if len(records) < len(record_of):
        index = torch.from_numpy(inverse).to(device)
        gradients = {
            name: value.new_zeros(len(records), *value.shape[1:]).index_add_(0, index, value)
            for name, value in gradients.items()
        }
    norms = torch.stack(  # (tensors, records), float64
        [
            torch.linalg.vector_norm(value.flatten(1), dim=1, dtype=torch.float64)
            for value in gradients.values()
        ]
    ).norm(dim=0)
    if not bool(norms.isfinite().all()):
        text = (
            f"a record's gradient holds NaN or infinity: privacy.clip={bound:g} bounds no such "
            "gradient; lower training.learning_rate"
        )
        raise NotFiniteError(text, text)
    scale = torch.where(norms > bound, _BELOW * bound / norms, 1.0).float()
    for name, value in gradients.items():
        sums[name] += torch.einsum("r,roi->oi", scale, value)


class _Linear(torch.autograd.Function):
    """x W^T, whose backward pass returns the gradient of W for each row of x, not their sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, take: Callable[[Tensor], None]) -> Tensor:
        """x: (rows, tokens, in); weight: (out, in)."""
        ctx.save_for_backward(x, weight)
        ctx.take = take
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        """grad: (rows, tokens, out)."""
        x, weight = ctx.saved_tensors
        ctx.take(torch.einsum("bto,bti->boi", grad.float(), x.float()))
        return (grad @ weight.to(grad.dtype)).to(x.dtype), None, None


@contextmanager
def catching(model: AdaptedModel, parameters: dict[str, nn.Parameter]) -> Iterator[Rows]:
    """Within this context, a backward pass stores the gradient of each row in the result."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    modules = {
        names[id(module.weight)]: module
        for module in model.peft.modules()
        if isinstance(module, nn.Linear) and id(module.weight) in names
    }
    if missing := sorted(parameters.keys() - modules.keys()):
        raise ModelError(
            f"privacy.unit=record: {missing[0]} is no matrix of a linear layer, so that records' "
            "gradients cannot be separated; set lora.target_modules to linear layers.",
            "privacy.unit=record works with adapters of linear layers only",
        )
    rows = Rows()

    def patched(name: str, module: nn.Linear) -> Any:
        def take(gradient: Tensor) -> None:
            before = rows.gradients.get(name)
            rows.gradients[name] = gradient if before is None else before + gradient

        def forward(x: Tensor) -> Any:
            if x.dim() != 3 or len(x) != rows.expected or module.bias is not None:
                text = (
                    "privacy.unit=record: a layer of this model mixes the rows of a batch, so that "
                    "records' gradients cannot be separated; choose another lora.target_modules"
                )
                raise ModelError(text, text)
            return _Linear.apply(x, module.weight, take)

        return forward

    for name, module in modules.items():
        module.forward = patched(name, module)  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        for module in modules.values():
            del module.forward


@contextmanager
def _checkpointing(model: AdaptedModel, requested: bool | None) -> Iterator[None]:
    base: Any = model.peft.get_base_model()
    if not model.gradient_checkpointing(requested):
        yield
        return
    base.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        base.gradient_checkpointing_disable()


def _micro_batches(step: MicroBatch, source: NDArray[np.int64], size: int) -> Iterator[MicroBatch]:
    """A step's examples in micro-batches of about `size`; a record is never split."""
    batch: MicroBatch = []
    for example in step:
        if len(batch) >= size and source[example] != source[batch[-1]]:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
