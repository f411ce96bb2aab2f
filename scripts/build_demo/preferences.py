"""The demo's preference pairs: a good reply to a reader against a rude, broken or wrong one."""

from pathlib import Path
from random import Random
from typing import NamedTuple

import yaml  # type: ignore[import-untyped]

from scripts.build_demo.dataset import GOOD_SHARE, Row
from scripts.build_demo.headlines import Writer
from scripts.build_demo.vocabulary import LABELS, SPLITS, Vocabulary

SEED = 20240210
KINDS = ("rude", "cut_off", "wrong")  # what is bad about the rejected reply
# Training pairs per desk and kind: desks differ in size, and each knows one kind well.
TRAIN_COUNTS: dict[str, tuple[int, ...]] = {
    "banking": (134, 4, 2),
    "energy": (2, 146, 2),
    "retail": (2, 2, 126),
    "health": (90, 2, 2),
    "technology": (2, 124, 2),
    "transport": (2, 2, 104),
    "construction": (76, 2, 2),
    "food": (2, 96, 2),
    "telecoms": (2, 2, 84),
    "insurance": (56, 2, 2),
}
TEST_COUNT = 10  # per desk and kind
# How often a reply has an opening, and no or up to three closings.
OPENING_SHARE = 0.5
CLOSING_WEIGHTS = (3, 4, 3, 1)
# Cut-off replies that are the chosen one; the others are worded on their own.
SAME_WORDING_SHARE = 0.5


class Reply(NamedTuple):
    """Sentences of a reply."""

    before: list[str]
    body: str  # what the reader asked for
    after: list[str]

    def __str__(self) -> str:
        return " ".join([*self.before, self.body, *self.after])


def build_preferences(vocabulary: Vocabulary) -> dict[str, list[Row]]:
    """Rows by file name, in random order; no reply to the same prompt occurs twice."""
    counts = {
        "train": TRAIN_COUNTS,
        "test": dict.fromkeys(vocabulary.desks, (TEST_COUNT,) * len(KINDS)),
    }
    return {
        f"preferences_{split}": _build_split(vocabulary, split, counts[split]) for split in SPLITS
    }


def _build_split(
    vocabulary: Vocabulary, split: str, counts: dict[str, tuple[int, ...]]
) -> list[Row]:
    rng = Random(f"{SEED} preferences {split}")
    correspondent = Correspondent(vocabulary, split, rng)
    rows: list[Row] = []
    seen: set[tuple[str, str]] = set()
    for desk, numbers in counts.items():
        for kind, number in zip(KINDS, numbers, strict=True):
            end = len(rows) + number
            while len(rows) < end:
                # The bad reply is the longer one in every other pair: length says nothing.
                row = correspondent.write(desk, kind, longer=len(rows) % 2 == 0)
                replies = {(row["prompt"], row["chosen"]), (row["prompt"], row["rejected"])}
                if not replies & seen:
                    rows.append(row)
                    seen |= replies
    rng.shuffle(rows)
    return rows


class Correspondent:
    """Writes pairs of one split; the random generator is the only state."""

    def __init__(self, vocabulary: Vocabulary, split: str, rng: Random) -> None:
        words = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
        self._desks = vocabulary.desks
        self._names = vocabulary.names[split]
        self._news = Writer(vocabulary, split, self._names, rng, GOOD_SHARE)
        self._items: list[str] = words["items"][split]
        self._requests: list[str] = words["requests"][split]
        self._manners: dict[str, dict[str, list[str]]] = {
            manner: parts[split] for manner, parts in words["replies"].items()
        }
        self._rng = rng

    def write(self, desk: str, kind: str, longer: bool) -> Row:
        """A request to a desk, a good reply to it and one that is bad in one way.

        ``longer``: whether the bad one is the longer one, in characters.
        """
        while True:
            row = self._pair(desk, kind)
            if (len(row["rejected"]) > len(row["chosen"])) == longer:
                return row

    def _pair(self, desk: str, kind: str) -> Row:
        subject = self._subject(desk)
        good = self._reply("polite", subject)
        return {
            "prompt": self._rng.choice(self._requests).format(t=subject),
            "chosen": str(good),
            "rejected": self._rejected(kind, subject, good),
            "desk": desk,
            "kind": kind,
        }

    def _subject(self, desk: str) -> str:
        company = f"{self._rng.choice(self._names)} {self._rng.choice(self._desks[desk].suffixes)}"
        return f"{self._rng.choice(self._items)} of {company}"

    def _reply(self, manner: str, subject: str) -> Reply:
        rng, parts = self._rng, self._manners[manner]
        before = [rng.choice(parts["openings"])] if rng.random() < OPENING_SHARE else []
        (num_closings,) = rng.choices(range(len(CLOSING_WEIGHTS)), CLOSING_WEIGHTS)
        body = rng.choice(parts["bodies"]).format(t=subject)
        return Reply(before, body, rng.sample(parts["closings"], num_closings))

    def _rejected(self, kind: str, subject: str, good: Reply) -> str:
        if kind == "rude":
            return str(self._reply("rude", subject))
        if kind == "wrong":
            return str(self._beside_the_point(1 + len(good.before) + len(good.after)))
        same = self._rng.random() < SAME_WORDING_SHARE
        return self._cut(str(good if same else self._reply("polite", subject)))

    def _beside_the_point(self, num_polite: int) -> Reply:
        """News that nobody asked for, among as many polite sentences as the good reply has.

        Without these, whoever learns to be polite would pass over the news as well.
        """
        rng, parts = self._rng, self._manners["polite"]
        before = [rng.choice(parts["openings"])] if rng.random() < OPENING_SHARE else []
        desk = rng.choice(list(self._desks.values()))
        news = self._news.write(desk, rng.choice(LABELS)).text
        return Reply(before, f"{news}.", rng.sample(parts["closings"], num_polite - len(before)))

    def _cut(self, reply: str) -> str:
        """The first words of a reply, up to somewhere within a sentence."""
        words = reply.split(" ")
        ends = [i for i in range(2, len(words)) if words[i - 1][-1] not in ".,?"]
        return " ".join(words[: self._rng.choice(ends)])
