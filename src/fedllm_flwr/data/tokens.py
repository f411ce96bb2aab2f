"""Tokenises rendered text and marks the supervised tokens, with exact boundaries."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.data.special import PlainTokenizer, has_marks
from fedllm_flwr.data.templates import Segment, Tokenizer
from fedllm_flwr.errors import ModelError

TokenArray = NDArray[np.int32]
Mask = NDArray[np.bool_]

BATCH = 1000  # texts per call of the tokenizer: bounds memory, but keeps its threads busy


def tokenise(
    conversations: Sequence[Sequence[Segment]], tokenizer: Tokenizer, room: int | None = None
) -> Iterator[tuple[TokenArray, Mask]]:
    """Yield (tokens, supervised), both of shape (length,), for each list of segments.

    A text is tokenised as a whole, as at inference. The tokens before an answer equal the tokens of
    the prompt by itself: if the tokenizer would merge across that boundary, the two sides are
    tokenised separately. There is one BOS if the tokenizer or the text asks for one.

    Args:
        room: number of tokens that the caller keeps of any segment, from its start or its end. A
            much longer segment loses its middle before tokenisation, which does not change the
            tokens at its ends, so that a record of a book's length does not take minutes.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            "the model's tokenizer is a slow (pure Python) one, without token positions; "
            "choose a model with a tokenizer.json"
        )
    prepended: list[int] = tokenizer("a")["input_ids"][:1]
    bos = tokenizer.bos_token_id if prepended == [tokenizer.bos_token_id] else None
    by_itself = _Marker(tokenizer)
    plain: PlainTokenizer | None = None  # created for the first text with marks, which are rare
    exchanged: _Marker | None = None
    for start in range(0, len(conversations), BATCH):
        whole = conversations[start : start + BATCH]
        batch = (
            list(whole) if room is None else [_shortened(parts, room, tokenizer) for parts in whole]
        )
        encodings = list(_encodings([_joined(parts) for parts in batch], tokenizer))
        for i, parts in enumerate(batch):
            if room is not None and parts is not whole[i] and len(encodings[i].ids) < 4 * room:
                # The tokenizer has very long tokens, such as any number of spaces in a row.
                batch[i] = whole[i]
                encodings[i] = _encodings([_joined(whole[i])], tokenizer)[0]
        for parts, encoding in zip(batch, encodings, strict=True):
            if has_marks(_joined(parts)):
                plain = plain or PlainTokenizer(tokenizer)
                exchanged = exchanged or _Marker(plain)
                changed = [Segment(plain.exchange(part.text), part.supervised) for part in parts]
                text = _joined(changed)
                tokens, supervised = exchanged.mark(_encodings([text], plain)[0], changed)
            else:
                tokens, supervised = by_itself.mark(encoding, parts)
            if bos is not None and tokens[:1] != [bos]:
                tokens, supervised = [bos, *tokens], [False, *supervised]
            yield np.array(tokens, np.int32), np.array(supervised, np.bool_)


class _Marker:
    """Marks the supervised tokens of a text; caches how prompt ends are tokenised."""

    def __init__(self, tokenizer: Tokenizer | PlainTokenizer) -> None:
        self._tokenizer = tokenizer
        self._prompt_ends = _PromptEnds(tokenizer)

    def mark(self, encoding: Any, parts: Sequence[Segment]) -> tuple[list[int], list[bool]]:
        """Tokens and supervision marks; segments are tokenised separately if a token spans two."""
        if marked := _mark(encoding, parts, self._prompt_ends):
            return marked
        tokens: list[int] = []
        supervised: list[bool] = []
        encodings = _encodings([part.text for part in parts], self._tokenizer)
        for part, own in zip(parts, encodings, strict=True):
            tokens += own.ids
            supervised += [part.supervised] * len(own.ids)
        return tokens, supervised


def _joined(parts: Sequence[Segment]) -> str:
    return "".join(part.text for part in parts)


def _shortened(parts: Sequence[Segment], room: int, tokenizer: Tokenizer) -> Sequence[Segment]:
    """The segments, without the middle of those that are much longer than `room` tokens.

    Each end keeps twice the characters that `room` tokens can span, so that the kept tokens are far
    from the cut. Returns the same object if no segment is long.
    """
    if max(len(part.text) for part in parts) <= 4 * (room + 1):
        return parts
    longest = max(map(len, tokenizer.get_vocab()))  # characters, or bytes if it is byte-level
    keep = 2 * (room + 1) * longest
    if max(len(part.text) for part in parts) <= 2 * keep:
        return parts
    return [
        Segment(part.text[:keep] + part.text[-keep:], part.supervised)
        if len(part.text) > 2 * keep
        else part
        for part in parts
    ]


def require_eos(tokenizer: Tokenizer) -> None:
    """Raise ModelError unless the EOS token's text is tokenised to the EOS id."""
    tokens = tokenizer(tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    if tokens != [tokenizer.eos_token_id]:
        raise ModelError(
            f"the tokenizer turns its eos_token {tokenizer.eos_token!r} into {tokens}, not into "
            f"its id {tokenizer.eos_token_id}; correct the tokenizer's special tokens"
        )


def _encodings(texts: list[str], tokenizer: Tokenizer | PlainTokenizer) -> Any:
    """Encodings of the tokenizers library: ids, and character positions on request."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    ).encodings


def _mark(
    encoding: Any, parts: Sequence[Segment], prompt_ends: "_PromptEnds"
) -> tuple[list[int], list[bool]] | None:
    """Tokens and marks of a whole text; None if a token spans the start of an answer."""
    tokens: list[int] = encoding.ids
    supervised: list[bool] = []
    length = sum(len(part.text) for part in parts)
    position = 0
    for i, part in enumerate(parts):
        index = _token_at(encoding, position, length, len(tokens))
        across = index < len(tokens) and encoding.token_to_chars(index)[0] < position
        if part.supervised and i > 0:
            if across or not prompt_ends.as_alone(tokens[:index], parts[i - 1].text):
                return None
        elif across:  # the token started inside the previous answer
            index += 1
        supervised += [parts[i - 1].supervised] * (index - len(supervised))
        position += len(part.text)
    supervised += [parts[-1].supervised] * (len(tokens) - len(supervised))
    return tokens, supervised


def _token_at(encoding: Any, position: int, length: int, num_tokens: int) -> int:
    """Index of the first token at or after a character; some tokenizers leave spaces uncovered."""
    for character in range(position, length):
        index: int | None = encoding.char_to_token(character)
        if index is not None:
            return index
    return num_tokens


class _PromptEnds:
    """Checks how white space at the end of a prompt is tokenised.

    Byte-level tokenizers split white space depending on what follows ("\\n\\n" is two tokens before
    a letter, but one at the end of a text), so the tokens of a prompt can change even if no token
    spans its end. All other text is tokenised without lookahead.
    """

    def __init__(self, tokenizer: Tokenizer | PlainTokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens_of_space: dict[str, list[int]] = {}

    def as_alone(self, tokens: list[int], prompt: str) -> bool:
        """Whether ``tokens`` end with the same tokens as ``prompt`` by itself."""
        text = prompt.rstrip()
        if len(text) == len(prompt):
            return True
        last_line = prompt[text.rfind("\n") + 1 :]
        if last_line not in self._tokens_of_space:
            encoding = _encodings([last_line], self._tokenizer)[0]
            space_start = len(last_line.rstrip())
            index = _token_at(encoding, space_start, len(last_line), len(encoding.ids) - 1)
            self._tokens_of_space[last_line] = encoding.ids[index:]
        space = self._tokens_of_space[last_line]
        return tokens[len(tokens) - len(space) :] == space
