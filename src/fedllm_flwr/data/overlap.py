"""Held-out records that are, or nearly are, training records."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedllm_flwr.data.kinds import answer_columns

if TYPE_CHECKING:
    import datasets

_WORDS = re.compile(r"\w+")
_SHINGLE = 4  # words that follow one another
_SHARED = 0.8  # of a held-out record's own shingles that one training record holds
_COMMON = 0.05  # share of held-out records from which on a shingle belongs to the template
_LEAST_OWN = 4  # shingles that a record must have for itself to be compared
_MOST_COMPARED = 50_000  # training records that are compared shingle by shingle
_LONGEST = 20_000  # characters of a record that are compared
_MOST_ASKED = 1_000  # held-out records that are

Shingle = tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """How many of `num_held_out` records are in the training records, word by word or nearly."""

    num_held_out: int
    equal: int
    near: int  # besides the equal ones

    @property
    def share(self) -> float:
        """Of the held-out records that are in the training records in either way."""
        return (self.equal + self.near) / max(1, self.num_held_out)


def overlap(train: "datasets.Dataset", held_out: "datasets.Dataset") -> Overlap:
    """Compare all turns of held-out and training records, without case and punctuation.

    Equal: the same words in the same order. Near: a training record holds at least 80 % of the
    record's runs of four words, not counting runs that many held-out records share. All records
    are compared for equality, the first 50,000 training and 1,000 held-out ones for nearness.
    """
    asked = [_words(text) for text in _texts(held_out)]
    texts = {" ".join(words) for words in (_words(text) for text in _texts(train))}
    equal = {number for number, words in enumerate(asked) if " ".join(words) in texts}
    near = _near(_texts(train), asked[:_MOST_ASKED]) - equal
    return Overlap(len(asked), len(equal), len(near))


def _near(train: Iterable[str], asked: Sequence[list[str]]) -> set[int]:
    """Numbers of the held-out records that one training record nearly holds."""
    shingles = [set(_shingles(words)) for words in asked]
    often = Counter(shingle for own in shingles for shingle in own)
    most = max(1.0, _COMMON * len(asked))
    own = {
        number: {shingle for shingle in some if often[shingle] <= most}
        for number, some in enumerate(shingles)
    }
    own = {number: some for number, some in own.items() if len(some) >= _LEAST_OWN}
    owners: defaultdict[Shingle, list[int]] = defaultdict(list)
    for number, some in own.items():
        for shingle in some:
            owners[shingle].append(number)
    near: set[int] = set()
    for _, text in zip(range(_MOST_COMPARED), train, strict=False):
        held: Counter[int] = Counter()
        for shingle in set(_shingles(_words(text))) & owners.keys():
            held.update(owners[shingle])
        near |= {number for number, count in held.items() if count >= _SHARED * len(own[number])}
    return near


def _texts(records: "datasets.Dataset") -> Iterator[str]:
    """All that a record says: its turns, and the answers beside them."""
    answers = [records[name][:] for name in answer_columns(records)]
    for number, turns in enumerate(records["messages"][:]):
        parts = [turn["content"] for turn in turns] + [column[number] for column in answers]
        yield " ".join(parts)[:_LONGEST]


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.casefold())


def _shingles(words: Sequence[str]) -> Iterator[Shingle]:
    return zip(*(words[start:] for start in range(_SHINGLE)), strict=False)
