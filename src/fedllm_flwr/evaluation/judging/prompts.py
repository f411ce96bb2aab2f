"""Judge prompts: FastChat's where they lie beside the data, otherwise the package's own."""

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
_FIELDS = {
    "rating": {"question", "answer"},
    "rating_reference": {"question", "answer", "ref_answer_1"},
    "rating_second": {"question_1", "answer_1", "question_2", "answer_2"},
    "rating_reference_second": {
        *("question_1", "answer_1", "question_2", "answer_2"),
        *("ref_answer_1", "ref_answer_2"),
    },
    "pair": {"question", "answer_a", "answer_b"},
    "harm": {"question", "answer"},
}


@dataclass(frozen=True)
class JudgePrompts:
    """System and user prompt by name; the user's has named fields in braces."""

    source: str  # fastchat | own
    texts: dict[str, tuple[str, str]]

    def messages(self, name: str, **fields: str) -> Messages:
        """The conversation to send."""
        system, user = self.texts[name]
        return [
            {"role": "system", "content": system.strip()},
            {"role": "user", "content": user.format(**fields)},
        ]

    @cached_property
    def digest(self) -> str:
        """Changes with any word of them."""
        return hashlib.sha256(json.dumps(self.texts, sort_keys=True).encode()).hexdigest()[:12]


def load_prompts(own: Path, folder: Path | None) -> JudgePrompts:
    """FastChat's judge_prompts.jsonl in `folder`, or else the file `own`; harm is always our own.

    Raises:
        DataError: a file is broken, or a prompt lacks a field.
    """
    texts = {
        name: (str(text["system"]), str(text["user"]))
        for name, text in yaml.safe_load(own.read_text(encoding="utf-8")).items()
    }
    file, source = (folder or own.parent) / "judge_prompts.jsonl", "own"
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
    for name, fields in _FIELDS.items():
        used = {field for _, field, _, _ in string.Formatter().parse(texts[name][1]) if field}
        if used != fields:
            raise DataError(
                f"{file if source == 'fastchat' else own}: the prompt {name} has the fields "
                f"{', '.join(sorted(used))}, expected {', '.join(sorted(fields))}."
            )
    return JudgePrompts(source, texts)
