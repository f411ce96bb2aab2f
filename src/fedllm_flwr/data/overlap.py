"""Overlap of held-out and training records: exact and near duplicates."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.data.remembered import cache_dir, remembered
from fedllm_flwr.data.sources import Records, texts_of

_WORDS = re.compile(r"\w+")
_SHINGLE = 4  # consecutive words
_SHARED = 0.8  # fraction of a held-out record's own shingles in one training record: near duplicate
_COMMON = 0.05  # fraction of held-out records above which a shingle is ascribed to the template
_LEAST_OWN = 4  # shingles of its own that a record needs to be compared
_MOST_COMPARED = 50_000  # training records compared by shingles
_LONGEST = 20_000  # characters compared per record
_MOST_ASKED = 1_000  # held-out records compared by shingles
_BEGINNING = 5  # leading words, which tell most texts apart

Shingle = tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """Number of held-out records with an exact or near duplicate in the training records."""

    num_held_out: int
    equal: int
    near: int  # near duplicates, without the exact ones

    @property
    def share(self) -> float:
        """Fraction of held-out records with an exact or near duplicate."""
        return (self.equal + self.near) / max(1, self.num_held_out)


def overlap(train: Records, held_out: Records, folder: Path | None = None) -> Overlap:
    """Compare all turns of held-out and training records, ignoring case and punctuation.

    Exact: the same words in the same order. Near: one training record contains at least 80 % of the
    held-out record's 4-grams of words, not counting 4-grams that many held-out records share. All
    records are compared for exact duplicates, and the first 50,000 training and 1,000 held-out
    records for near duplicates.

    Args:
        folder: folder that keeps the result between processes; None: the user's cache.
    """

    identities = train.identity, held_out.identity
    if not all(identities):
        return _compare(train, held_out)
    _, counts = remembered(
        ("overlap", *identities),
        lambda: ({}, asdict(_compare(train, held_out))),
        folder or cache_dir() / "records",
    )
    return Overlap(**counts)


def near_duplicates(train: Records, texts: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each training record is an exact or near duplicate of one of `texts`.

    The criterion is that of `overlap`, applied to all records and texts. (num_records,)
    """
    index = _Index(texts)
    return np.array(
        [bool(index.equal(text) or index.near(text)) for text in map(text_of, train)], np.bool_
    )


def _compare(train: Records, held_out: Records) -> Overlap:
    index = _Index([text_of(record) for record in held_out], _MOST_ASKED)
    equal: set[int] = set()
    near: set[int] = set()
    for count, record in enumerate(train):
        text = text_of(record)
        equal.update(index.equal(text))
        if count < _MOST_COMPARED:
            near |= index.near(text)
    return Overlap(len(held_out), len(equal), len(near - equal))


class _Index:
    """Held-out texts by their words, and by the 4-grams that few of them share.

    Args:
        most_asked: number of texts, from the first on, to look up by 4-grams; None: all.
    """

    def __init__(self, texts: Sequence[str], most_asked: int | None = None) -> None:
        asked = [_words(text[:_LONGEST]) for text in texts]
        self._by_words: defaultdict[str, list[int]] = defaultdict(list)
        for number, words in enumerate(asked):
            self._by_words[" ".join(words)].append(number)
        self._beginnings = {tuple(words[:_BEGINNING]) for words in asked}
        shingles = [set(_shingles(words)) for words in asked[:most_asked]]
        often = Counter(shingle for some in shingles for shingle in some)
        most = max(1.0, _COMMON * len(shingles))
        own = [{shingle for shingle in some if often[shingle] <= most} for some in shingles]
        self._needed = [_SHARED * len(some) for some in own]  # shared 4-grams of a near duplicate
        self._owners: defaultdict[Shingle, list[int]] = defaultdict(list)
        for number, some in enumerate(own):
            for shingle in some if len(some) >= _LEAST_OWN else ():
                self._owners[shingle].append(number)

    def equal(self, text: str) -> Sequence[int]:
        """Indices of the texts with the same words."""
        if _beginning(text) not in self._beginnings:
            return ()
        return self._by_words.get(" ".join(_words(text)), ())

    def near(self, text: str) -> set[int]:
        """Indices of the texts of whose own 4-grams `text` contains at least 80 %."""
        shared: Counter[int] = Counter()
        for shingle in set(_shingles(_words(text))) & self._owners.keys():
            shared.update(self._owners[shingle])
        return {number for number, count in shared.items() if count >= self._needed[number]}


def text_of(record: Any) -> str:
    """All texts of a record, at most 20,000 characters."""
    return " ".join(texts_of(record))[:_LONGEST]


def _beginning(text: str) -> tuple[str, ...]:
    """The first words of a text, found without splitting the whole text."""
    words = _words(text[: 50 * _BEGINNING])
    if len(words) <= _BEGINNING:  # the last word may be incomplete
        words = _words(text)
    return tuple(words[:_BEGINNING])


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.casefold())


def _shingles(words: Sequence[str]) -> Iterator[Shingle]:
    return zip(*(words[start:] for start in range(_SHINGLE)), strict=False)
