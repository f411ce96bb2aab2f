"""Membership inference: does an adapter score the records it was trained on above others?

Each attack gives a record a number that is higher where it takes the record for a member:

- ``loss``: mean log-probability of the answer's tokens (Yeom et al. 2018);
- ``min-k``: mean over the least likely fifth of them (Shi et al. 2024, "Detecting Pretraining Data
  from Large Language Models");
- ``calibrated``: ``loss`` minus the same under the base model, which takes out how hard a record is
  (Watson et al. 2022, "On the Importance of Difficulty Calibration in Membership Inference").

``base`` is ``loss`` under the base model alone, which has seen neither: away from 0.5 it says that
members and non-members differ by themselves, and the others are to be read against it.
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

Values = NDArray[np.float64]

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
    """How well members are told from non-members.

    Args:
        auc: chance that a member scores above a non-member; 0.5 is guessing.
        tpr: share of the members found where 1 % of the non-members are taken for some.
    """

    auc: Interval
    tpr: Interval


def attack_scores(model: AdaptedModel, records: Encoded, batch_tokens: int) -> dict[str, Values]:
    """What each attack gives each record under the adapter in `model`, (records,)."""
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
    members: Mapping[str, Values], others: Mapping[str, Values], seed: int
) -> dict[str, Attack]:
    """Every attack's success on the scores of members and of non-members."""
    return {name: attack(members[name], others[name], seed) for name in members}


def mean_of(values: Values, seed: int) -> Interval:
    """The mean and its 95 % interval over the values."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    return Interval(float(values.mean()), *_interval(values[drawn].mean(1)))


@torch.inference_mode()
def _answer_log_probs(
    model: AdaptedModel, records: Encoded, batch_tokens: int
) -> tuple[Values, Values]:
    """Mean log-probability of each answer's tokens, and of their least likely fifth."""
    model.peft.eval()
    means, lowest = np.zeros(len(records)), np.zeros(len(records))
    for batch in by_length(records.lengths, batch_tokens):
        log_probs, counts = trained_log_probs(model, records, batch)
        for row, example in enumerate(batch):
            count = int(counts[row])
            tokens = np.sort(log_probs[row].double().cpu().numpy())[:count]  # the rest are zero
            means[example] = tokens.mean()
            lowest[example] = tokens[: max(1, round(_SHARE * count))].mean()
    return means, lowest


def attack(members: Values, others: Values, seed: int) -> Attack:
    """Success of one score."""
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


def _interval(values: Values | list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    return low, high


def area_under_curve(members: Values, others: Values) -> float:
    """Share of the pairs in which the member scores higher, ties counting half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, side="left")
    upto = np.searchsorted(ordered, members, side="right")
    return float((below + upto).mean() / (2 * len(others)))


def found_at_few_errors(members: Values, others: Values) -> float:
    """Share of the members above all but 1 % of the non-members."""
    allowed = int(_FALSE_POSITIVES * len(others))
    threshold = np.sort(others)[len(others) - 1 - allowed]
    return float((members > threshold).mean())
