"""Samples: the scored examples of one model on one task."""

from dataclasses import dataclass, field
from typing import Any

Sample = dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """The scored examples of one task.

    Args:
        samples: one dict per example: ``id``, the fields that the metrics use, and fields that
            explain the score.
        first_prompt: the exact prompt of the first example.
        notes: remarks for readers of the score, such as the number of truncated prompts.
        seconds: time spent scoring.
    """

    samples: list[Sample]
    first_prompt: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
