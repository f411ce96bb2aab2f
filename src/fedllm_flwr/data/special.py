"""Treats special tokens that are written out in a record as text, not as control tokens.

A fast tokenizer converts the text ``</s>`` or ``<|eot_id|>`` into the control token wherever it
occurs. In a record, this would end an answer or start another speaker's turn. Rendering therefore
replaces each such text in a message by a mark, and the template adds its own control tokens. A copy
of the tokenizer, with marks and control tokens swapped, then tokenises the result. Texts without
marks go to the original tokenizer.

Marks are the last private-use characters of Unicode, from U+10F000. If a record itself contains one
that stands for a special token, it is read as that token's text, never as the control token.
"""

import json
import re
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fedllm_flwr.data.records import Message
from fedllm_flwr.errors import ModelError

if TYPE_CHECKING:
    from fedllm_flwr.data.templates import Tokenizer

_FIRST_MARK = 0x10F000  # private-use characters, one for each special token
_ANY_MARK = re.compile("[\U0010f000-\U0010fffd]")


def marked(messages: Iterable[Message], tokenizer: "Tokenizer") -> list[Message]:
    """Replace each special token written out in the messages by a mark."""
    return [
        {**message, "content": marked_text(message["content"], tokenizer)} for message in messages
    ]


def marked_text(text: str, tokenizer: "Tokenizer") -> str:
    """Replace each special token written out in `text` by a mark.

    With ``model.special_tokens_as_text=false``, nothing is replaced.
    """
    return _special(tokenizer).mark(text) if getattr(tokenizer, _AS_TEXT, True) else text


def has_marks(text: str) -> bool:
    """Whether `text` contains marks."""
    return _ANY_MARK.search(text) is not None


class PlainTokenizer:
    """Tokenises marked text: marks become plain text, control tokens remain control tokens."""

    is_fast = True

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._special = _special(tokenizer)
        self._backend = self._special.exchanged(tokenizer)

    def exchange(self, text: str) -> str:
        """Swap marks and control tokens: marks become plain text, control tokens become marks."""
        return self._special.exchange(text)

    def __call__(self, texts: Sequence[str], **_: Any) -> Any:
        """Encodings of exchanged texts, without added special tokens."""
        return SimpleNamespace(
            encodings=self._backend.encode_batch(texts, add_special_tokens=False)
        )


_AS_TEXT, _KEPT = "special_tokens_as_text", "_special_tokens_of_records"


class _Special:
    """Maps the special tokens of a tokenizer to marks and back."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self.ids = {token.content: i for i, token in added.items() if token.special}
        names = sorted(self.ids, key=lambda name: (-len(name), name))
        self.marks = {name: chr(_FIRST_MARK + i) for i, name in enumerate(names)}
        self._names = {mark: name for name, mark in self.marks.items()}
        self._written = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def mark(self, text: str) -> str:
        return self._written.sub(lambda found: self.marks[found[0]], text)

    def exchange(self, text: str) -> str:
        both = re.compile(f"{self._written.pattern}|{_ANY_MARK.pattern}")
        other = self.marks | self._names
        return both.sub(lambda found: other.get(found[0], found[0]), text)

    def exchanged(self, tokenizer: "Tokenizer") -> Any:
        """A copy of the backend tokenizer in which marks have the special tokens' ids."""
        from tokenizers import Tokenizer as Backend

        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend.update(truncation=None, padding=None)
        for token in backend["added_tokens"]:
            token["content"] = self.marks.get(token["content"], token["content"])
        model = backend["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self.marks.get(k, k): i for k, i in model["vocab"].items()}
        else:  # a unigram model: pieces with their scores
            model["vocab"] = [[self.marks.get(k, k), score] for k, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = self.marks.get(model["unk_token"], model["unk_token"])
        copy = Backend.from_str(json.dumps(backend))
        for name, mark in self.marks.items():
            if copy.token_to_id(mark) != self.ids[name]:
                raise ModelError(
                    f"the tokenizer's special token {name!r} cannot be told from the same text in "
                    "a record; set model.special_tokens_as_text=false to take both for the token"
                )
        return copy


def _special(tokenizer: "Tokenizer") -> _Special:
    """The mapping of a tokenizer, cached on the tokenizer, whose vocabulary does not change."""
    if not hasattr(tokenizer, _KEPT):
        setattr(tokenizer, _KEPT, _Special(tokenizer))
    special: _Special = getattr(tokenizer, _KEPT)
    return special
