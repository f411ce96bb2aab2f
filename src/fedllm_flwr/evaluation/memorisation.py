"""Memorisation of canaries by an adapter (Carlini et al. 2019, "The Secret Sharer").

The exposure of a canary is log2 R - log2 rank, where rank is its code's rank by likelihood among R
codes after the canary's prompt. The rank of a code that was not learnt is uniform, so its exposure
is at least x bits with probability 2^-x, and log2 e = 1.44 on average.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.config import Config
from fedllm_flwr.data.canaries import Canary, codes
from fedllm_flwr.data.choices import encode_choices
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.scoring import Question, score

_CANDIDATES = 127  # codes besides the canary's own, for exposures of up to 7 bits


@dataclass(frozen=True)
class Exposures:
    """Exposure and surprise of each canary, both (canaries,)."""

    bits: NDArray[np.float64]
    surprise: NDArray[np.float64]  # log-likelihood (nats) of its code minus the others' mean


def exposures(model: AdaptedModel, config: Config, canaries: Sequence[Canary]) -> Exposures:
    """Rank the code of each canary among random codes, under the adapter in `model`."""
    others = codes(config, "candidates", _CANDIDATES)
    questions = []
    for canary in canaries:
        encoded = encode_choices(
            [canary.messages],
            [canary.messages[-1]["content"], *others],
            *(model.tokenizer, config.data.template, config.training.max_length),
        )
        questions.append(Question(encoded.prompts[0], encoded.answers[0]))
    found = score(model, questions, config.evaluation.batch_tokens)
    log_probs = np.array([[each.log_prob for each in answers] for answers in found])
    own, rest = log_probs[:, :1], log_probs[:, 1:]
    rank = 1 + (rest > own).sum(1) + (rest == own).sum(1) / 2
    return Exposures(np.log2((_CANDIDATES + 1) / rank), own[:, 0] - rest.mean(1))
