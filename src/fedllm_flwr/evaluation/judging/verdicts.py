"""Verdicts of a judge, parsed from its replies; each case is judged once and saved on disk.

A reply is a rating, a choice between two answers, or harmless or harmful. A reply with none or
several of these has no verdict, and the judge is asked again. FastChat, which defines this format,
then falls back to the first number in single brackets, which can be a footnote.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm_flwr.data.records import Messages
from fedllm_flwr.evaluation.judging.endpoint import (
    BROKEN,
    DECLINED,
    MAX_TOKENS,
    EndpointJudge,
    OnProgress,
)
from fedllm_flwr.evaluation.judging.json_lines import json_lines

if TYPE_CHECKING:
    import openai

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
    """The verdict in a reply; None if there is none, or more than one."""
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
    """One request for a verdict."""

    scale: Scale
    messages: Messages

    def key(self, judge: str) -> str:
        """Identifies requests that are equal to the judge."""
        what = [judge, MAX_TOKENS, 0.0, self.scale, self.messages]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:20]


def judge_all(
    cases: Sequence[Case],
    judge: EndpointJudge,
    path: Path,
    attempts: int,
    progress: OnProgress = lambda done, total: None,
) -> tuple[list[float | None], dict[str, int]]:
    """A verdict for each case (None if no reply had one), and `usage`, including earlier calls.

    Replies in the file at `path` are reused. A reply without a verdict is requested again, up to
    `attempts` times in total: first greedily, then sampled, because a greedy reply would repeat.

    Raises:
        JudgeError: the judge cannot be used; its replies so far are in the file.
    """
    keys = [case.key(judge.model) for case in cases]
    by_key = dict(zip(keys, cases, strict=True))
    replies: dict[str, list[dict[str, Any]]] = {key: [] for key in keys}  # in order of attempts
    with json_lines(path) as file:
        for record in file.records:
            if record["key"] in replies:
                replies[record["key"]].append(record)

        async def settle(client: "openai.AsyncOpenAI", key: str) -> None:
            case, found = by_key[key], replies[key]
            while not _settled(found, attempts):
                reply = await judge.reply(client, case.messages, 0.7 if found else 0.0)
                verdictless = reply.finish_reason in (DECLINED, BROKEN)
                record = {
                    "key": key,
                    "attempt": len(found),
                    "judge": judge.model,
                    "scale": case.scale.value,
                    "verdict": None if verdictless else read_verdict(reply.text, case.scale),
                    "reply": reply.text,
                    "finish_reason": reply.finish_reason,
                    "prompt_tokens": reply.prompt_tokens,
                    "completion_tokens": reply.completion_tokens,
                    "asked": case.messages,
                }
                file.append([record])
                found.append(record)
            progress(sum(_settled(some, attempts) for some in replies.values()), len(replies))

        if todo := [key for key, found in replies.items() if not _settled(found, attempts)]:
            judge.each(todo, settle)
    given = {
        key: next((r["verdict"] for r in found if r["verdict"] is not None), None)
        for key, found in replies.items()
    }
    return [given[key] for key in keys], usage([r for found in replies.values() for r in found])


def usage(replies: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Number of replies and tokens of judging; replies without token counts are ``uncounted``."""
    counted = [
        reply
        for reply in replies
        if reply["prompt_tokens"] is not None and reply["completion_tokens"] is not None
    ]
    declined = sum(reply["finish_reason"] == DECLINED for reply in replies)
    return {
        "replies": len(replies),
        "prompt_tokens": sum(reply["prompt_tokens"] for reply in counted),
        "completion_tokens": sum(reply["completion_tokens"] for reply in counted),
        "uncounted": len(replies) - len(counted) - declined,
        "declined": declined,
    }


def _settled(replies: Sequence[Mapping[str, Any]], attempts: int) -> bool:
    """Whether there is a verdict, or no attempt is left."""
    if len(replies) >= attempts:
        return True
    return bool(replies) and (
        replies[-1]["verdict"] is not None or replies[-1]["finish_reason"] == DECLINED
    )
