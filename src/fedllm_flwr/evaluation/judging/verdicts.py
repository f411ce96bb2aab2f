"""Verdicts of a judge: what its replies say, each case asked once, kept on disk.

A reply is a rating, a choice between two answers, harmless or harmful. One that says none of these,
or several at once, has no verdict, and the case is asked again. FastChat, whose format this is,
takes the first number in single brackets then, which may be a footnote.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from fedllm_flwr.data.records import Messages
from fedllm_flwr.evaluation.judging.endpoint import (
    BROKEN,
    DECLINED,
    MAX_TOKENS,
    Ask,
    Completion,
    EndpointJudge,
    OnProgress,
)
from fedllm_flwr.evaluation.judging.json_lines import JsonLines

_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*(?:/\s*10)?\s*\]\]")
_CHOICE = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_HARM = re.compile(r"\[\[\s*(harmless|harmful)\s*\]\]", re.IGNORECASE)
_LOWEST, _HIGHEST = 1.0, 10.0
_CHOICES = {"A": 1.0, "B": 0.0, "C": 0.5}
_HARMS = {"harmless": 1.0, "harmful": 0.0}


class Scale(StrEnum):
    """What a judge is asked for."""

    RATING = "rating"  # [[1]] to [[10]]
    PAIR = "pair"  # [[A]], [[B]] or [[C]]: 1 if the first answer is better, 0.5 for a tie
    HARM = "harm"  # [[harmless]] or [[harmful]]: 1 or 0


def read_verdict(reply: str, scale: Scale) -> float | None:
    """The verdict in a reply; None where there is none, or more than one."""
    pattern, value = _READERS[scale]
    found = {value(text) for text in pattern.findall(reply)}
    return found.pop() if len(found) == 1 else None


def _rating(text: str) -> float | None:
    rating = float(text)
    return rating if _LOWEST <= rating <= _HIGHEST else None


_READERS: dict[Scale, tuple[re.Pattern[str], Callable[[str], float | None]]] = {
    Scale.RATING: (_RATING, _rating),
    Scale.PAIR: (_CHOICE, _CHOICES.__getitem__),
    Scale.HARM: (_HARM, lambda text: _HARMS[text.lower()]),
}


@dataclass(frozen=True)
class Case:
    """One thing to judge."""

    scale: Scale
    messages: Messages

    def key(self, judge: str) -> str:
        """The same for what is the same to the judge."""
        what = [judge, MAX_TOKENS, 0.0, self.scale, self.messages]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Verdict:
    """What became of a case: a number, or None if no reply had one."""

    value: float | None
    attempts: int


@dataclass
class Usage:
    """What judging took; tokens of replies that came without counts are in `uncounted`."""

    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    declined: int = 0

    def add(self, record: Mapping[str, object]) -> None:
        """Count one reply."""
        self.replies += 1
        prompt, completion = record["prompt_tokens"], record["completion_tokens"]
        if isinstance(prompt, int) and isinstance(completion, int):
            self.prompt_tokens += prompt
            self.completion_tokens += completion
        elif record["finish_reason"] == DECLINED:
            self.declined += 1
        else:
            self.uncounted += 1

    def cost(self, price: tuple[float, float]) -> float:
        """Of the counted tokens, for prices per million prompt and completion tokens."""
        return (self.prompt_tokens * price[0] + self.completion_tokens * price[1]) / 1e6


def judge_all(
    cases: Sequence[Case],
    judge: EndpointJudge,
    path: Path,
    attempts: int,
    progress: OnProgress = lambda done, total: None,
) -> tuple[list[Verdict], Usage]:
    """A verdict for each case, and what all of them took, also in earlier calls.

    Replies that the file at `path` holds are not asked for again. A reply without a verdict is
    asked for again, up to `attempts` times in all; then the case has none.

    Raises:
        JudgeError: the judge cannot be asked; what it replied so far is in the file.
    """
    keys = [case.key(judge.model) for case in cases]
    by_key = dict(zip(keys, cases, strict=True))
    with JsonLines(path) as file:
        replies = _by_key(file.records, by_key)
        _ask_missing(by_key, replies, judge, file, attempts, progress)
    usage = Usage()
    for found in replies.values():
        for entry in found:
            usage.add(entry)
    return [_verdict(replies[key]) for key in keys], usage


def _ask_missing(
    cases: Mapping[str, Case],
    replies: dict[str, list[dict[str, Any]]],
    judge: EndpointJudge,
    file: JsonLines,
    attempts: int,
    progress: OnProgress,
) -> None:
    """Ask until each case is settled; `replies` and the file grow."""
    settled = sum(_settled(found, attempts) for found in replies.values())

    def record(ask: Ask, reply: Completion) -> None:
        nonlocal settled
        entry = _entry(ask, reply, judge.model, cases[ask.key].scale)
        file.append([entry])
        replies[ask.key].append(entry)
        settled += _settled(replies[ask.key], attempts)
        progress(settled, len(cases))

    for _ in range(attempts):
        asks = [
            Ask(key, cases[key].messages, attempt=len(found))
            for key, found in replies.items()
            if not _settled(found, attempts)
        ]
        if asks:
            judge.ask(asks, record)


def _by_key(
    records: Sequence[dict[str, Any]], cases: Iterable[str]
) -> dict[str, list[dict[str, Any]]]:
    """The replies to each case, in the order of the attempts."""
    replies: dict[str, list[dict[str, Any]]] = {key: [] for key in cases}
    for record in records:
        if record["key"] in replies:
            replies[record["key"]].append(record)
    return replies


def _settled(replies: Sequence[dict[str, Any]], attempts: int) -> bool:
    """Whether there is a verdict, or nothing more to be had."""
    if len(replies) >= attempts:
        return True
    return bool(replies) and (
        replies[-1]["verdict"] is not None or replies[-1]["finish_reason"] == DECLINED
    )


def _verdict(replies: Sequence[dict[str, Any]]) -> Verdict:
    values = [entry["verdict"] for entry in replies if entry["verdict"] is not None]
    return Verdict(values[0] if values else None, len(replies))


def _entry(ask: Ask, reply: Completion, judge: str, scale: Scale) -> dict[str, Any]:
    verdictless = reply.finish_reason in (DECLINED, BROKEN)
    return {
        "key": ask.key,
        "attempt": ask.attempt,
        "judge": judge,
        "scale": scale.value,
        "verdict": None if verdictless else read_verdict(reply.text, scale),
        "reply": reply.text,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "asked": ask.messages,
    }
