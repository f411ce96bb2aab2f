"""Membership inference: attacks that separate an adapter's training records from others.

Each attack assigns a record a score that is higher if the record is likely to be a member:

- ``loss``: mean log-probability of the answer's tokens (Yeom et al. 2018);
- ``min-k``: mean over the least likely fifth of these tokens (Shi et al. 2024, "Detecting
  Pretraining Data from Large Language Models");
- ``calibrated``: ``loss`` minus ``loss`` under the base model, which removes the difficulty of the
  record (Watson et al. 2022, "On the Importance of Difficulty Calibration in Membership
  Inference").

``base`` is ``loss`` under the base model, which has seen no record of either kind. If its AUC
differs from 0.5, members and non-members differ by themselves, and it is the level against which
the attacks must be read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.inputs import by_length
from fedllm_flwr.models.scoring import trained_log_probs

PerRecord = NDArray[np.float64]

_SHARE = 0.2  # k of min-k
_FALSE_POSITIVES = 0.01
_RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval over the records."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Attack:
    """How well an attack separates members from non-members.

    Args:
        auc: probability that a member scores above a non-member; 0.5 is guessing.
        tpr: true-positive rate at a false-positive rate of 1 %.
    """

    auc: Interval
    tpr: Interval


def attack_scores(model: AdaptedModel, records: Encoded, batch_tokens: int) -> dict[str, PerRecord]:
    """The score of each record under the adapter in `model`, by attack, (records,)."""
    found = _answer_log_probs(model, records, batch_tokens)
    with model.peft.disable_adapter():
        base = _answer_log_probs(model, records, batch_tokens)
    return {
        "loss": found[0],
        "min-k": found[1],
        "calibrated": found[0] - base[0],
        "base": base[0],
    }


def judge(
    members: Mapping[str, PerRecord], others: Mapping[str, PerRecord], seed: int
) -> dict[str, Attack]:
    """The success of each attack, from the scores of members and non-members."""
    return {name: attack(members[name], others[name], seed) for name in members}


def mean_of(values: PerRecord, seed: int) -> Interval:
    """The mean and its 95 % interval over the values."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    return Interval(float(values.mean()), *_interval(values[drawn].mean(1)))


@torch.inference_mode()
def _answer_log_probs(
    model: AdaptedModel, records: Encoded, batch_tokens: int
) -> tuple[PerRecord, PerRecord]:
    """Mean log-probability of each answer's tokens, and of the least likely fifth of them."""
    model.peft.eval()
    means, lowest = np.zeros(len(records)), np.zeros(len(records))
    for batch in by_length(records.lengths, batch_tokens):
        log_probs, counts = trained_log_probs(model, records, batch)
        for row, example in enumerate(batch):
            count = int(counts[row])
            tokens = np.sort(log_probs[row].double().cpu().numpy())[:count]  # padding is zero
            means[example] = tokens.mean()
            lowest[example] = tokens[: max(1, round(_SHARE * count))].mean()
    return means, lowest


def attack(members: PerRecord, others: PerRecord, seed: int) -> Attack:
    """The success of one attack."""
    rng = np.random.default_rng(seed)
    resampled = [
        (
            members[rng.integers(len(members), size=len(members))],
            others[rng.integers(len(others), size=len(others))],
        )
        for _ in range(_RESAMPLES)
    ]
    return Attack(
        *(
            Interval(
                measure(members, others),
                *_interval([measure(*sample) for sample in resampled]),
            )
            for measure in (area_under_curve, found_at_few_errors)
        )
    )


def _interval(values: PerRecord | list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    return low, high


def area_under_curve(members: PerRecord, others: PerRecord) -> float:
    """Fraction of the pairs in which the member scores higher; ties count half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, side="left")
    upto = np.searchsorted(ordered, members, side="right")
    return float((below + upto).mean() / (2 * len(others)))


def found_at_few_errors(members: PerRecord, others: PerRecord) -> float:
    """True-positive rate at a false-positive rate of 1 %."""
    allowed = int(_FALSE_POSITIVES * len(others))
    threshold = np.sort(others)[len(others) - 1 - allowed]
    return float((members > threshold).mean())
