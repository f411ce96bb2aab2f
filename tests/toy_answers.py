"""Random judged answers for the toy model."""

import numpy as np

from fedllm_flwr.tasks.kto.examples import AnswerReport, EncodedAnswers
from toy_pairs import random_pairs


def random_answers(count: int, seed: int = 0, share: float = 0.6) -> EncodedAnswers:
    """Answers of random letters to different prompts, about `share` of them desirable."""
    rows = random_pairs(count, seed).rows.take(2 * np.arange(count))
    desirable = np.random.default_rng(seed + 1).random(count) < share
    return EncodedAnswers(rows, desirable, AnswerReport(count, 0, 0, 0))
