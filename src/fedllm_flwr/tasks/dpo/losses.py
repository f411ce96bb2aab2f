"""The losses of preference pairs, each as in its paper.

With pi the policy and pi_ref the reference, r_w = log pi(y_w | x) / pi_ref(y_w | x) is the
log-ratio of the chosen answer y_w, r_l that of the rejected one y_l, and h = r_w - r_l. beta is
``dpo.beta``, eps ``dpo.label_smoothing``. A loss gives one value per pair; their mean is minimised.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

DISCOPOP_TAU = 0.05


@dataclass(frozen=True)
class ScoredPairs:
    """A micro-batch of pairs as input to the losses; each tensor has shape (pairs,).

    ``chosen`` and ``rejected`` are log-probabilities of whole answers (nats) under the policy,
    with gradients; ``ref_chosen`` and ``ref_rejected`` are those under the reference. The rest are
    the answers' numbers of tokens.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def r_w(self) -> Tensor:
        """Log-ratios of the chosen answers."""
        return self.chosen - self.ref_chosen

    @property
    def r_l(self) -> Tensor:
        """Log-ratios of the rejected answers."""
        return self.rejected - self.ref_rejected

    @property
    def h(self) -> Tensor:
        """r_w - r_l."""
        return self.r_w - self.r_l

    @property
    def h_per_token(self) -> Tensor:
        """Difference of the log-ratios per token of their answers."""
        return self.r_w / self.chosen_tokens - self.r_l / self.rejected_tokens


Loss = Callable[[ScoredPairs, float, float], Tensor]


def sigmoid(pairs: ScoredPairs, beta: float, eps: float) -> Tensor:
    """DPO: -log sigma(beta h) (Rafailov et al. 2023, equation 7)."""
    return -logsigmoid(beta * pairs.h)


def sigmoid_norm(pairs: ScoredPairs, beta: float, eps: float) -> Tensor:
    """DPO of log-ratios per token (Lambert et al. 2024, Tulu 3)."""
    return -logsigmoid(beta * pairs.h_per_token)


def hinge(pairs: ScoredPairs, beta: float, eps: float) -> Tensor:
    """SLiC-HF's hinge against a reference: max(0, 1 - beta h) (Zhao et al. 2023)."""
    return relu(1 - beta * pairs.h)


def ipo(pairs: ScoredPairs, beta: float, eps: float) -> Tensor:
    """IPO: (h - 1 / (2 beta))^2 (Azar et al. 2023, equation 17), of log-ratios per token."""
    return (pairs.h_per_token - 1 / (2 * beta)) ** 2


def robust(pairs: ScoredPairs, beta: float, eps: float) -> Tensor:
    """DPO that is unbiased where a share eps of the labels is flipped (Chowdhury et al. 2024)."""
    clean, flipped = _kept_and_swapped(beta * pairs.h)
    return ((1 - eps) * clean - eps * flipped) / (1 - 2 * eps)


def exo_pair(pairs: ScoredPairs, beta: float, eps: float) -> Tensor:
    """EXO: KL(p_theta || [1 - eps, eps]) over the two answers (Ji et al. 2024, equation 16)."""
    smoothing = torch.tensor(eps, device=pairs.h.device)
    win, lose = beta * pairs.h, -beta * pairs.h
    return torch.sigmoid(win) * (logsigmoid(win) - torch.log1p(-smoothing)) + torch.sigmoid(
        lose
    ) * (logsigmoid(lose) - torch.log(smoothing))


def nca_pair(pairs: ScoredPairs, beta: float, eps: float) -> Tensor:
    """NCA: noise contrastive alignment of both answers' likelihoods (Chen et al. 2024)."""
    win, lose = beta * pairs.r_w, beta * pairs.r_l
    return -logsigmoid(win) - 0.5 * logsigmoid(-win) - 0.5 * logsigmoid(-lose)


def bco_pair(pairs: ScoredPairs, beta: float, eps: float) -> Tensor:
    """BCO on pairs, without its reward shift (Jung et al. 2024)."""
    return -logsigmoid(beta * pairs.r_w) - logsigmoid(-beta * pairs.r_l)


def sppo_hard(pairs: ScoredPairs, beta: float, eps: float) -> Tensor:
    """SPPO with hard preferences: P = 1 for y_w and 0 for y_l (Wu et al. 2024, equation 4.7)."""
    return (pairs.r_w - 0.5 / beta) ** 2 + (pairs.r_l + 0.5 / beta) ** 2


def aot(pairs: ScoredPairs, beta: float, eps: float) -> Tensor:
    """AOT: the policy's margins dominate the reference's; sorts the pairs (Melnyk et al. 2024)."""
    policy = torch.sort(pairs.chosen - pairs.rejected).values
    reference = torch.sort(pairs.ref_chosen - pairs.ref_rejected).values
    kept, swapped = _kept_and_swapped(beta * (policy - reference))
    return (1 - eps) * kept + eps * swapped


def aot_unpaired(pairs: ScoredPairs, beta: float, eps: float) -> Tensor:
    """AOT of chosen against rejected log-ratios, each sorted (Melnyk et al. 2024)."""
    h = torch.sort(pairs.r_w).values - torch.sort(pairs.r_l).values
    kept, swapped = _kept_and_swapped(beta * h)
    return (1 - eps) * kept + eps * swapped


def apo_zero(pairs: ScoredPairs, beta: float, eps: float) -> Tensor:
    """APO-zero: raises y_w and lowers y_l (D'Oosterlinck et al. 2024, equation 7)."""
    return 1 - torch.sigmoid(beta * pairs.r_w) + torch.sigmoid(beta * pairs.r_l)


def apo_down(pairs: ScoredPairs, beta: float, eps: float) -> Tensor:
    """APO-down: lowers both, y_l more (D'Oosterlinck et al. 2024, equation 8)."""
    return torch.sigmoid(beta * pairs.r_w) + 1 - torch.sigmoid(beta * pairs.h)


def discopop(pairs: ScoredPairs, beta: float, eps: float) -> Tensor:
    """DiscoPOP: logistic and exponential loss, mixed by the ratio (Lu et al. 2024, equation 5)."""
    rho = beta * pairs.h
    share = torch.sigmoid(rho / DISCOPOP_TAU)
    return -logsigmoid(rho) * (1 - share) + torch.exp(-rho) * share


def _kept_and_swapped(rho: Tensor) -> tuple[Tensor, Tensor]:
    """DPO's loss of the pairs as labelled, and with swapped labels."""
    return -logsigmoid(rho), -logsigmoid(-rho)


LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (
        *(sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard),
        *(aot, aot_unpaired, apo_zero, apo_down, discopop),
    )
}


def share_above_zero(values: NDArray[np.float64]) -> float:
    """Fraction of margins above zero; ties count half, as equal rewards prefer neither answer."""
    return float(np.mean(0.5 + 0.5 * np.sign(values)))
