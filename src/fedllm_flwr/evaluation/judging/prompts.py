"""Judge prompts: FastChat's if they are in the data folder, otherwise the package's own."""

import hashlib
import json
import string
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from fedllm_flwr.data.records import Messages
from fedllm_flwr.errors import DataError
from fedllm_flwr.evaluation.suites.local_data import read_rows

_FASTCHAT = {
    "rating": "single-v1",
    "rating_reference": "single-math-v1",
    "rating_second": "single-v1-multi-turn",
    "rating_reference_second": "single-math-v1-multi-turn",
    "pair": "pair-v2",
}


@dataclass(frozen=True)
class JudgePrompts:
    """System and user prompts by name; user prompts have named fields in braces."""

    source: str  # fastchat | own
    texts: dict[str, tuple[str, str]]

    def messages(self, name: str, **fields: str) -> Messages:
        """The judge's conversation, with the fields filled in."""
        system, user = self.texts[name]
        return [
            {"role": "system", "content": system.strip()},
            {"role": "user", "content": user.format(**fields)},
        ]

    @cached_property
    def digest(self) -> str:
        """A digest of all prompts."""
        return hashlib.sha256(json.dumps(self.texts, sort_keys=True).encode()).hexdigest()[:12]


def load_prompts(own: Path, folder: Path | None) -> JudgePrompts:
    """FastChat's judge_prompts.jsonl in `folder`, or the file `own`; "harm" is always from `own`.

    Raises:
        DataError: FastChat's file is invalid, or its prompts have other fields than those of `own`.
    """
    ours = {
        name: (str(text["system"]), str(text["user"]))
        for name, text in yaml.safe_load(own.read_text(encoding="utf-8")).items()
    }
    texts, source = dict(ours), "own"
    file = (folder or own.parent) / "judge_prompts.jsonl"
    if file.is_file():
        source = "fastchat"
        try:
            known = {
                row["name"]: (row["system_prompt"], row["prompt_template"])
                for row in read_rows(file)
            }
            texts |= {name: known[theirs] for name, theirs in _FASTCHAT.items()}
        except (DataError, KeyError, TypeError) as error:
            raise DataError(
                f"{file}: not FastChat's judge prompts ({error!r}); copy the file again, or delete "
                "it."
            ) from error
    for name, (_, user) in texts.items():
        used, expected = _fields(user), _fields(ours[name][1])
        if used != expected:
            raise DataError(
                f"{file}: the prompt {name} has the fields {', '.join(sorted(used))}, expected "
                f"{', '.join(sorted(expected))}."
            )
    return JudgePrompts(source, texts)


def _fields(prompt: str) -> set[str]:
    """Names of a prompt's fields in braces."""
    return {field for _, field, _, _ in string.Formatter().parse(prompt) if field}
