"""Samples: the scored examples of one model on one task."""

from dataclasses import dataclass, field
from typing import Any

Sample = dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """The examples of one task, scored.

    Args:
        samples: one plain dict for each example: ``id``, the fields that metrics look at, and
            whatever else explains the score.
        first_prompt: the text that the model saw for the first example, to the last character.
        notes: what the reader of the score should know, such as the number of prompts cut.
        seconds: that scoring took.
    """

    samples: list[Sample]
    first_prompt: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
