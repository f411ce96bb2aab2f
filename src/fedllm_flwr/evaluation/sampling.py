"""Sampling with a seed of its own for each row, whatever else is in the batch."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor


class SeededSampling(LogitsProcessor):
    """Lets through one token per row, drawn from softmax(scores / temperature).

    Each draw turns one uniform number of the row's own sequence into a token by the inverse of the
    cumulative distribution, so that a row's answer does not depend on its neighbours, and an answer
    made again is the same. Rows of temperature 0 keep their scores: the most likely token.

    Args:
        temperatures: per row, >= 0.
        seeds: per row.
    """

    def __init__(self, temperatures: Sequence[float], seeds: Sequence[int]) -> None:
        self._temperatures = np.array(temperatures, np.float64)
        self._draws = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores, (rows, vocabulary), with -inf at all tokens of a row but the drawn one."""
        uniform = np.array([draw.random() for draw in self._draws])
        rows = np.flatnonzero(self._temperatures > 0)
        if not len(rows):
            return scores
        sampled = torch.from_numpy(rows).to(scores.device)
        heat = torch.from_numpy(self._temperatures[rows]).to(scores.device, torch.float32)
        probabilities = (scores[sampled].float() / heat[:, None]).softmax(-1).double()
        reached = probabilities.cumsum(-1)
        wanted = torch.from_numpy(uniform[rows]).to(scores.device) * reached[:, -1]
        tokens = torch.searchsorted(reached, wanted[:, None], right=True)
        tokens = tokens.clamp(max=scores.shape[-1] - 1)
        kept = torch.full_like(scores[sampled], -torch.inf).scatter_(-1, tokens, 0.0)
        result = scores.clone()
        result[sampled] = kept
        return result
