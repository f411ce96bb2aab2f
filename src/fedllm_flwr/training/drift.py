"""Client-side corrections of the gradient, as one callback for unmodified trainers.

FedProx (Li et al. 2020) adds mu (w_i - w) to the gradient, SCAFFOLD (Karimireddy et al. 2020) adds
c - c_i. Neither paper clips gradients. Here both are added after gradient clipping, so that
max_grad_norm bounds only the gradient of the client's own loss. If they were added before, clipping
would limit the proximal pull mu ||w_i - w|| and shrink the client's own gradient with it, and
c - c_i would no longer cancel the drift.

OpenFedLLM has the proximal term in the loss, where it is clipped with it, and subtracts
lr (c - c_i) from the weights after each step (`LocalTerms.as_openfedllm`).
"""

from typing import Any

import numpy as np
import torch

from fedllm_flwr.factors import kept_rank, pairs
from fedllm_flwr.params import Params
from fedllm_flwr.training.local_terms import LocalTerms
from fedllm_flwr.training.trainer_library import TrainerCallback

Tensors = dict[str, torch.Tensor]


class DriftCorrection(TrainerCallback):
    """Adds mu (w_i - start) and the offset of `terms` to the gradient; averages the raw gradient.

    ``steps`` counts optimizer steps, except those that a gradient scaler (float16) has skipped
    because the gradient overflowed: they change no weight, and their gradient is NaN.

    Args:
        parameters: the adapter's parameters by name, at ``terms.start``.
        terms: the terms that the algorithm adds to the client's objective.
        learning_rate: local learning rate, for corrections after the optimizer step.
    """

    def __init__(
        self, parameters: dict[str, torch.nn.Parameter], terms: LocalTerms, learning_rate: float
    ) -> None:
        self._parameters = parameters
        self._terms = terms
        self._learning_rate = learning_rate
        self._start: Tensors = (
            {name: p.detach().clone() for name, p in parameters.items()} if terms.mu else {}
        )
        if terms.mu and terms.anchor is not None:
            self._start = {
                name: torch.from_numpy(terms.anchor[name].copy()).to(p)
                for name, p in parameters.items()
            }
        self._offset: Tensors = {
            name: torch.from_numpy(value.copy()).to(parameters[name].device)
            for name, value in (terms.offset or {}).items()
        }
        self._gradient_sum: Tensors = (
            {name: torch.zeros_like(p) for name, p in parameters.items()}
            if terms.averages_gradient
            else {}
        )
        self.steps = 0
        self._skipped = False

    def penalty(self) -> torch.Tensor | None:
        """Terms of the loss: mu/2 ||w_i - w||^2 as in OpenFedLLM, and the tails of the factors."""
        terms = []
        if self._start and self._terms.as_openfedllm:
            own = self._parameters.items()
            squares = torch.stack([(p - self._start[name]).square().sum() for name, p in own])
            terms.append(squares.sum() * (self._terms.mu / 2))
        if self._terms.tail is not None:
            strength, share = self._terms.tail
            for name_a, name_b in pairs(self._parameters):
                a, b = self._parameters[name_a], self._parameters[name_b]
                k = kept_rank(len(a), share)
                terms.append(strength * b[:, k:].norm() * a[k:].norm())
        return torch.stack(terms).sum() if terms else None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Correct the clipped gradient before the optimizer step."""
        self._skipped = args.fp16 and not self._finite()
        if self._skipped:
            return
        self.steps += 1
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if self._gradient_sum:
                self._gradient_sum[name] += parameter.grad
            if self._start and not self._terms.as_openfedllm:
                offset = parameter.detach() - self._start[name]
                parameter.grad.add_(offset, alpha=self._terms.mu)
            if self._offset and not self._terms.as_openfedllm:
                parameter.grad.add_(self._offset[name])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """OpenFedLLM's form of SCAFFOLD: w_i -= lr (c - c_i) after the optimizer's step."""
        if self._skipped or not (self._offset and self._terms.as_openfedllm):
            return
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.sub_(self._offset[name], alpha=self._learning_rate)

    def _finite(self) -> bool:
        """Whether all gradients are finite; otherwise the gradient scaler skips the step."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all())

    def mean_gradient(self) -> Params:
        """Mean over the steps of the client's own gradient: clipped, but not corrected."""
        return {
            name: (total / max(1, self.steps)).cpu().numpy().astype(np.float32)
            for name, total in self._gradient_sum.items()
        }
