"""The demo's preference pairs: a good reply to a reader against a rude, broken or wrong one."""

from pathlib import Path
from random import Random
from typing import Any

import yaml  # type: ignore[import-untyped]

from scripts.build_demo.dataset import Row
from scripts.build_demo.vocabulary import SPLITS

SEED = 20240210
KINDS = ("rude", "cut_off", "wrong")  # what is bad about the rejected reply
# Training pairs per desk and kind: desks differ in size, and each knows one kind well.
TRAIN_COUNTS: dict[str, tuple[int, ...]] = {
    "banking": (168, 8, 4),
    "energy": (4, 150, 6),
    "retail": (6, 4, 140),
    "health": (120, 6, 4),
    "technology": (4, 116, 4),
    "transport": (4, 4, 112),
    "construction": (96, 2, 6),
    "food": (2, 86, 4),
    "telecoms": (4, 2, 78),
    "insurance": (62, 4, 2),
}
TEST_COUNT = 10  # per desk and kind
OWN_SHARE = 0.7  # of the subjects; the others are common to all desks
GREETING_SHARE = 0.3
# How often a reply has an opening, and up to three closings.
OPENING_SHARE = 0.5
CLOSING_WEIGHTS = (3, 4, 3, 1)
# Rejected replies that are the chosen one, spoiled; the others are worded on their own.
SAME_WORDING_SHARE = 0.4


def build_preferences() -> dict[str, list[Row]]:
    """Rows by file name, in random order; no reply to the same prompt occurs twice."""
    words = load_words()
    desks = [desk for desk in words["subjects"] if desk != "common"]
    counts = {"train": TRAIN_COUNTS, "test": dict.fromkeys(desks, (TEST_COUNT,) * len(KINDS))}
    return {f"preferences_{split}": _build_split(words, split, counts[split]) for split in SPLITS}


def load_words() -> Any:
    """Read preferences.yaml, which lies beside this module."""
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def _build_split(words: Any, split: str, counts: dict[str, tuple[int, ...]]) -> list[Row]:
    rng = Random(f"{SEED} preferences {split}")
    correspondent = Correspondent(words, split, rng)
    rows: list[Row] = []
    seen: set[tuple[str, str]] = set()
    for desk, numbers in counts.items():
        for kind, number in zip(KINDS, numbers, strict=True):
            end = len(rows) + number
            while len(rows) < end:
                row = correspondent.write(desk, kind)
                replies = {(row["prompt"], row["chosen"]), (row["prompt"], row["rejected"])}
                if len(replies - seen) == 2:
                    rows.append(row)
                    seen |= replies
    rng.shuffle(rows)
    return rows


class Correspondent:
    """Writes pairs of one split; the random generator is the only state."""

    def __init__(self, words: Any, split: str, rng: Random) -> None:
        self._subjects = {desk: lists[split] for desk, lists in words["subjects"].items()}
        self._greetings: list[str] = words["greetings"][split]
        self._requests: list[str] = words["requests"][split]
        self._manners = {manner: parts[split] for manner, parts in words["replies"].items()}
        self._rng = rng

    def write(self, desk: str, kind: str) -> Row:
        """A request to a desk, a good reply to it and one that is bad in one way.

        The bad one is the longer one as often as not, so that length says nothing.
        """
        longer = self._rng.random() < 0.5
        while True:
            row = self._pair(desk, kind)
            if (len(row["rejected"]) > len(row["chosen"])) == longer:
                return row

    def _pair(self, desk: str, kind: str) -> Row:
        subject = self._subject(desk)
        good = self._reply("polite")
        return {
            "prompt": self._prompt(subject),
            "chosen": good.format(t=subject),
            "rejected": self._rejected(kind, desk, subject, good),
            "desk": desk,
            "kind": kind,
        }

    def _subject(self, desk: str) -> str:
        own = self._rng.random() < OWN_SHARE
        subject: str = self._rng.choice(self._subjects[desk if own else "common"])
        return subject

    def _prompt(self, subject: str) -> str:
        request = self._rng.choice(self._requests).format(t=subject)
        if self._rng.random() < GREETING_SHARE:
            return f"{self._rng.choice(self._greetings)} {request}"
        return request

    def _reply(self, manner: str) -> str:
        """A whole reply, with ``{t}`` for its subject."""
        rng, parts = self._rng, self._manners[manner]
        opening = [rng.choice(parts["openings"])] if rng.random() < OPENING_SHARE else []
        (num_closings,) = rng.choices(range(len(CLOSING_WEIGHTS)), CLOSING_WEIGHTS)
        closings = rng.sample(parts["closings"], num_closings)
        return " ".join([*opening, rng.choice(parts["bodies"]), *closings])

    def _rejected(self, kind: str, desk: str, subject: str, good: str) -> str:
        if kind == "rude":
            return self._reply("rude").format(t=subject)
        same = self._rng.random() < SAME_WORDING_SHARE
        reply = good if same else self._reply("polite")
        if kind == "wrong":
            return reply.format(t=self._other_subject(desk, subject))
        return self._cut(reply.format(t=subject))

    def _other_subject(self, desk: str, subject: str) -> str:
        while True:
            other = self._subject(desk)
            if other != subject:
                return other

    def _cut(self, reply: str) -> str:
        """The first words of a reply, up to somewhere within a sentence."""
        words = reply.split(" ")
        ends = [i for i in range(2, len(words)) if words[i - 1][-1] not in ".,?"]
        return " ".join(words[: self._rng.choice(ends)])
