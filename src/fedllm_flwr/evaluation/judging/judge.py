"""What a judge is to the rest of this package: asked in batches, answers as they come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedllm_flwr.data.records import Messages


@dataclass(frozen=True)
class Ask:
    """One question to a judge."""

    key: str  # of what is asked; equal keys ask the same
    messages: Messages
    attempt: int = 0  # > 0: replies without a verdict came before


@dataclass(frozen=True)
class Reply:
    """What a judge said. Token counts are None where it did not say."""

    text: str
    finish_reason: str  # stop, length, or declined: it will not reply to this
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


Record = Callable[[Ask, Reply], None]

DECLINED = "declined"
MAX_TOKENS = 2048  # of a reply, as in MT-Bench
# The first reply is the most likely one; another like it would help nobody.
TEMPERATURES = (0.0, 0.7)


def temperature(attempt: int) -> float:
    """Of the reply to an attempt."""
    return TEMPERATURES[min(attempt, 1)]


class Judge(Protocol):
    """Something that replies to conversations."""

    @property
    def name(self) -> str:
        """The model: verdicts of another one are not used."""

    def check(self) -> None:
        """Raise JudgeError or ConfigError if it cannot be asked at all."""

    def ask(self, asks: Sequence[Ask], record: Record) -> None:
        """Ask all, and call `record` with each reply as soon as it is there.

        Raises:
            JudgeError: it cannot go on; replies so far were recorded.
        """
