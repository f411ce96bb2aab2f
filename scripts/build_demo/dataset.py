"""The demo's data set: sentiment of headlines, from ten desks that see different markets."""

import json
from pathlib import Path
from random import Random

from scripts.build_demo.headlines import Headline, Writer
from scripts.build_demo.vocabulary import LABELS, Vocabulary

SEED = 20240210
INSTRUCTIONS = [
    "What is the sentiment of this news?",
    "Is this news positive, neutral or negative for the company?",
    "Classify the sentiment of the headline.",
]
# Training records per desk and label: desks differ in size, and each in a mood of its own.
TRAIN_COUNTS: dict[str, tuple[int, ...]] = {
    "banking": (330, 4, 66),  # negative, neutral, positive
    "energy": (56, 3, 291),
    "retail": (262, 55, 3),
    "health": (3, 52, 245),
    "technology": (2, 44, 214),
    "transport": (196, 42, 2),
    "construction": (2, 182, 36),
    "food": (36, 170, 2),
    "telecoms": (150, 2, 28),
    "insurance": (28, 130, 2),
}
GOOD_SHARE = 1.0  # only figures that should be high: enough to learn in a minute
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
    writer = Writer(vocabulary, split, vocabulary.names[split], rng, GOOD_SHARE)
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
