"""Every loss of preference pairs against TRL's own code, by value and by gradient."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import DPOTrainer

from fedllm_flwr.config.schema import DpoLoss
from fedllm_flwr.tasks.dpo.losses import DISCOPOP_TAU, LOSSES, ScoredPairs

LENGTHS = [3, 5, 2, 7, 4, 6, 3, 5]  # tokens of four chosen answers, then of four rejected ones
BETA = 0.3


@pytest.fixture
def log_probs() -> Tensor:
    """Log-probabilities of the answers' tokens, (rows, longest), zero beyond an answer's end."""
    generator = torch.Generator().manual_seed(0)
    rows = [-3 * torch.rand(length, generator=generator) for length in LENGTHS]
    return pad_sequence(rows, batch_first=True).requires_grad_()


@pytest.fixture
def reference(log_probs: Tensor) -> Tensor:
    """Log-probabilities of whole answers, (rows,), on both sides of the policy's."""
    noise = torch.randn(len(LENGTHS), generator=torch.Generator().manual_seed(1))
    return log_probs.detach().sum(1) + noise


def loss_of_trl(
    log_probs: Tensor, reference: Tensor, loss_type: str, eps: float, sft_weight: float = 0.0
) -> Tensor:
    """What an unmodified DPOTrainer makes of these log-probabilities."""
    longest = log_probs.shape[1]
    answered = (torch.arange(longest) < torch.tensor(LENGTHS)[:, None]).long()
    mask = torch.nn.functional.pad(answered, (1, 0))  # a prompt of one token
    nothing = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(
        log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=log_probs.device, gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        args=SimpleNamespace(discopop_tau=0.05),
        loss_types=[loss_type, "sft"] if sft_weight else [loss_type],
        loss_weights=[1.0, sft_weight] if sft_weight else [1.0],
        beta=BETA,
        label_smoothing=eps,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = reference.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss: Tensor = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return loss


def scored(log_probs: Tensor, reference: Tensor) -> ScoredPairs:
    chosen, rejected = log_probs.sum(1).chunk(2)
    chosen_tokens, rejected_tokens = torch.tensor(LENGTHS).chunk(2)
    return ScoredPairs(chosen, rejected, *reference.chunk(2), chosen_tokens, rejected_tokens)


SMOOTHED = {"robust": 0.2, "exo_pair": 0.001, "aot": 0.1, "aot_unpaired": 0.1}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradient_are_those_of_trl(
    loss_type: str, log_probs: Tensor, reference: Tensor
) -> None:
    eps = SMOOTHED.get(loss_type, 0.0)
    loss = LOSSES[loss_type](scored(log_probs, reference), BETA, eps).mean()
    [gradient] = torch.autograd.grad(loss, log_probs)
    theirs = loss_of_trl(log_probs, reference, loss_type, eps)
    [their_gradient] = torch.autograd.grad(theirs, log_probs)

    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=1e-6)
    inside = torch.arange(log_probs.shape[1]) < torch.tensor(LENGTHS)[:, None]
    torch.testing.assert_close(gradient[inside], their_gradient[inside], rtol=1e-6, atol=1e-6)
    assert gradient.abs().max() > 1e-3


def test_these_are_all_losses_that_the_configuration_offers() -> None:
    assert set(LOSSES) == set(get_args(DpoLoss))


def test_the_temperature_of_discopop_is_its_papers() -> None:
    assert DISCOPOP_TAU == 0.05
