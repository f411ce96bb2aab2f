"""What a gradient scaler's skipped steps do to the corrections, with torch's own scaler."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedllm_flwr.training.drift import DriftCorrection
from fedllm_flwr.training.local_terms import LocalTerms

FP16 = SimpleNamespace(fp16=True)
TARGETS = [1.0, 2.0, float("inf"), 3.0, float("nan"), 4.0]  # the gradient overflows at two


@pytest.mark.parametrize("as_openfedllm", [False, True])
def test_steps_that_the_scaler_skips_do_not_count(as_openfedllm: bool) -> None:
    """c_i is the mean over the steps that were taken, and finite."""
    weight = torch.nn.Parameter(torch.zeros(3))
    c = np.full(3, 0.25, np.float32)
    terms = LocalTerms(
        {"w": np.zeros(3, np.float32)},
        *(0.5, {"w": c}, as_openfedllm),
        averages_gradient=True,
    )
    drift = DriftCorrection({"w": weight}, terms, learning_rate=0.1)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected, gradients = np.zeros(3, np.float32), []
    for target in TARGETS:
        optimizer.zero_grad()
        loss = ((weight - 1) * target).sum()
        if (penalty := drift.penalty()) is not None:
            loss = loss + penalty
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([weight], 100.0)
        drift.on_pre_optimizer_step(FP16, None, None)
        scaler.step(optimizer)
        scaler.update()
        drift.on_optimizer_step(FP16, None, None)
        if np.isfinite(target):
            pull = 0.5 * expected
            gradients.append(target + (pull if as_openfedllm else 0.0))
            expected = expected - 0.1 * (target + pull + c)
    assert drift.steps == 4
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(drift.mean_gradient()["w"], np.mean(gradients, axis=0), rtol=1e-5)


def test_without_a_scaler_every_step_counts() -> None:
    """A NaN then reaches the weights, and the server refuses the update."""
    weight = torch.nn.Parameter(torch.zeros(3))
    drift = DriftCorrection({"w": weight}, LocalTerms({}), 0.1)
    weight.grad = torch.full((3,), float("nan"))
    drift.on_pre_optimizer_step(SimpleNamespace(fp16=False), None, None)
    assert drift.steps == 1
