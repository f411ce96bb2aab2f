"""Samples: the scored examples of one model on one task."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
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

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Samples":
        """What `as_dict` gave."""
        return cls(**values)


@dataclass(frozen=True)
class RunOptions:
    """Options by which tasks are run.

    Args:
        limit: examples of each (harness) task, the first ones; None: all.
        shots: solved examples in the prompt; None: as each task says.
        data_root: folder of local data files; None: the Hugging Face Hub.
        work_dir: where a runner may keep what lets a stopped evaluation go on.
        batch_tokens: prompt tokens of one forward pass.
        seed: of everything drawn at random.
        extra: options of single runners; those of the runner ``code`` under that name.
    """

    limit: int | None = None
    shots: int | None = None
    data_root: Path | None = None
    work_dir: Path | None = None
    batch_tokens: int = 4096
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
