"""The words of the headlines, from vocabulary.yaml."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

LABELS = ("negative", "neutral", "positive")
SPLITS = ("train", "test")
MOVEMENTS = ("up", "down", "flat")


@dataclass(frozen=True)
class Movement:
    """Ways to say that a figure moves in one direction."""

    verbs: list[str]  # base form
    adjectives: list[str]
    nouns: list[str]


@dataclass(frozen=True)
class Desk:
    """What one desk writes about."""

    name: str
    suffixes: list[str]  # of company names
    good: list[str]  # figures that should be high
    bad: list[str]  # figures that should be low
    events: dict[str, dict[str, list[str]]]  # [split][label]


@dataclass(frozen=True)
class Vocabulary:
    """Everything a headline is made of; phrasings are kept per split."""

    names: dict[str, list[str]]  # [split]
    periods: list[str]
    places: list[str]
    movements: dict[str, dict[str, Movement]]  # [direction][split]
    figure_templates: dict[str, list[str]]  # [split]
    event_templates: dict[str, list[str]]  # [split]
    common_events: dict[str, dict[str, list[str]]]  # [split][label]
    desks: dict[str, Desk]


def load_vocabulary() -> Vocabulary:
    """Read vocabulary.yaml, which lies beside this module."""
    raw: dict[str, Any] = yaml.safe_load(
        Path(__file__).with_name("vocabulary.yaml").read_text(encoding="utf-8")
    )
    return Vocabulary(
        names=_names(raw["name_starts"], raw["name_ends"]),
        periods=raw["periods"],
        places=raw["places"],
        movements={
            direction: {split: Movement(**words) for split, words in splits.items()}
            for direction, splits in raw["movements"].items()
        },
        figure_templates=raw["figure_templates"],
        event_templates=raw["event_templates"],
        common_events=raw["common_events"],
        desks={name: _desk(name, words) for name, words in raw["desks"].items()},
    )


def _desk(name: str, words: dict[str, Any]) -> Desk:
    events = {split: words[split] for split in SPLITS}
    return Desk(name, words["suffixes"], words["good"], words["bad"], events)


def _names(starts: list[str], ends: list[str]) -> dict[str, list[str]]:
    """Every start with every end; each end and each start is in both splits."""
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    for i, start in enumerate(starts):
        for j, end in enumerate(ends):
            names["test" if (i + j) % 3 == 0 else "train"].append(start + end)
    return names
