"""Verdicts of a judge, parsed from its replies; each case is asked once and kept on disk.

A reply is a rating, a choice between two answers, harmless or harmful. One that says none of these,
or several at once, has no verdict, and the case is asked again. FastChat, whose format this is,
takes the first number in single brackets then, which may be a footnote.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
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
    """Scale of a judge's verdicts."""

    RATING = "rating"  # [[1]] to [[10]]
    PAIR = "pair"  # [[A]], [[B]] or [[C]]: 1 if the first answer is better, 0.5 for a tie
    HARM = "harm"  # [[harmless]] or [[harmful]]: 1 or 0


def read_verdict(reply: str, scale: Scale) -> float | None:
    """The verdict in a reply; None where there is none, or more than one."""
    match scale:
        case Scale.RATING:
            found = {float(text) for text in _RATING.findall(reply)}
        case Scale.PAIR:
            found = {_CHOICES[text] for text in _CHOICE.findall(reply)}
        case Scale.HARM:
            found = {_HARMS[text.lower()] for text in _HARM.findall(reply)}
    if len(found) != 1 or (scale is Scale.RATING and not _LOWEST <= min(found) <= _HIGHEST):
        return None
    return found.pop()


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
    """Verdict on a case: a number, or None if no reply held one."""

    value: float | None
    attempts: int


@dataclass
class Usage:
    """Replies and tokens that judging took; replies without token counts are `uncounted`."""

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
    replies: dict[str, list[dict[str, Any]]] = {key: [] for key in keys}  # in order of attempts
    with JsonLines(path) as file:
        for record in file.records:
            if record["key"] in replies:
                replies[record["key"]].append(record)
        _ask_missing(by_key, replies, judge, file, attempts, progress)
    usage, verdicts = Usage(), {}
    for key, found in replies.items():
        for record in found:
            usage.add(record)
        values = (record["verdict"] for record in found if record["verdict"] is not None)
        verdicts[key] = Verdict(next(values, None), len(found))
    return [verdicts[key] for key in keys], usage


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
        scale = cases[ask.key].scale
        verdictless = reply.finish_reason in (DECLINED, BROKEN)
        entry = {
            "key": ask.key,
            "attempt": ask.attempt,
            "judge": judge.model,
            "scale": scale.value,
            "verdict": None if verdictless else read_verdict(reply.text, scale),
            "reply": reply.text,
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "asked": ask.messages,
        }
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


def _settled(replies: Sequence[dict[str, Any]], attempts: int) -> bool:
    """Whether there is a verdict, or no further attempt is due."""
    if len(replies) >= attempts:
        return True
    return bool(replies) and (
        replies[-1]["verdict"] is not None or replies[-1]["finish_reason"] == DECLINED
    )
