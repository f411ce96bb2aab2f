"""The demo's data set: sentiment of headlines, from ten desks that see different markets."""

import json
from pathlib import Path
from random import Random

from scripts.build_demo.headlines import Headline, Writer
from scripts.build_demo.vocabulary import LABELS, Vocabulary

SEED = 20240210
INSTRUCTIONS = [
    "What is the sentiment of this news?",
    "Is this headline negative, neutral or positive?",
    "Classify the sentiment of the headline.",
]
# Training records per desk and label: desks differ in size, and each in a mood of its own.
TRAIN_COUNTS: dict[str, tuple[int, ...]] = {
    "banking": (300, 16, 84),  # negative, neutral, positive
    "energy": (70, 12, 268),
    "retail": (224, 84, 12),
    "health": (12, 70, 218),
    "technology": (12, 60, 188),
    "transport": (168, 62, 10),
    "construction": (8, 168, 44),
    "food": (50, 150, 8),
    "telecoms": (140, 8, 32),
    "insurance": (32, 120, 8),
}
TEST_COUNT = 12  # per desk and label

Row = dict[str, str]


def build_dataset(vocabulary: Vocabulary) -> dict[str, list[Row]]:
    """Rows of each split, in random order; no headline occurs twice."""
    counts = {
        "train": TRAIN_COUNTS,
        "test": dict.fromkeys(vocabulary.desks, (TEST_COUNT,) * len(LABELS)),
    }
    return {split: _build_split(vocabulary, split, counts[split]) for split in counts}


def write_dataset(splits: dict[str, list[Row]], directory: Path) -> None:
    """One JSON Lines file per split."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_bytes(lines.encode())


def _build_split(
    vocabulary: Vocabulary, split: str, counts: dict[str, tuple[int, ...]]
) -> list[Row]:
    rng = Random(f"{SEED} {split}")
    writer = Writer(vocabulary, split, vocabulary.names[split], rng)
    headlines: dict[str, Headline] = {}
    for desk, numbers in counts.items():
        for label, number in zip(LABELS, numbers, strict=True):
            end = len(headlines) + number
            while len(headlines) < end:
                headline = writer.write(vocabulary.desks[desk], label)
                headlines.setdefault(headline.text, headline)
    rows = [_row(headline, rng) for headline in headlines.values()]
    rng.shuffle(rows)
    return rows


def _row(headline: Headline, rng: Random) -> Row:
    return {
        "instruction": rng.choice(INSTRUCTIONS),
        "input": headline.text,
        "output": headline.label,
        "desk": headline.desk,
    }
