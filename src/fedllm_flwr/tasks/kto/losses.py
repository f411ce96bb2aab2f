"""The loss of KTO, and the reference point of its implied rewards."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedllm_flwr.config.schema import KtoConfig


def kto_loss(ratio: Tensor, desirable: Tensor, z0: float, kto: KtoConfig) -> Tensor:
    """Loss of each answer, (answers,) (Ethayarajh et al. 2024, equation 7).

    Args:
        ratio: implied rewards log pi(y|x) / pi_ref(y|x), (answers,).
        desirable: whether each answer is desirable, (answers,).
    """
    gain = torch.where(desirable, ratio - z0, z0 - ratio)
    weight = torch.where(desirable, kto.desirable_weight, kto.undesirable_weight)
    return weight * (1 - torch.sigmoid(kto.beta * gain))


def reference_point(policy: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """z0 >= 0 from log-probabilities of mismatched answers under both models, (answers,)."""
    return max(0.0, float((policy.astype(np.float64) - reference).mean()))
