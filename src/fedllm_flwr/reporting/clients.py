"""The table of clients: sizes, labels and lengths."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedllm_flwr.data.partition import ClientStats

OTHER = "other labels"
TABLE_LABELS = 50  # a column of free text has too many values for a column each


def clients_table(stats: "Sequence[ClientStats]") -> str:
    """``clients.csv``: one row per client; lengths in characters of all turns of a record."""
    labels, counts = label_counts(stats, TABLE_LABELS)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    lengths = ["mean_length", "median_length", "max_length"]
    writer.writerow(["client", "examples", *(f"label:{label}" for label in labels), *lengths])
    for item, row in zip(stats, counts, strict=True):
        writer.writerow(
            [
                item.name,
                item.num_examples,
                *row,
                f"{item.mean_length:.1f}",
                f"{item.median_length:g}",
                item.max_length,
            ]
        )
    return text.getvalue()


def sizes_table(sizes: Mapping[str, int]) -> str:
    """``clients.csv`` where nothing but the number of examples is known of clients."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("client", "examples"), *sizes.items()])
    return text.getvalue()


def label_counts(
    stats: "Sequence[ClientStats]", limit: int
) -> tuple[list[str], list[tuple[int, ...]]]:
    """At most `limit` labels, the rest summed as `OTHER`, and their counts per client.

    Labels come in alphabetical order; when there are too many, the most frequent ones stay.
    Records without a label (the data have none) count for no label.
    """
    totals: Counter[str] = Counter()
    for item in stats:
        totals.update(item.label_counts)
    totals.pop("", None)
    frequent = [label for label, _ in totals.most_common()]
    kept = sorted(frequent if len(frequent) <= limit else frequent[: limit - 1])
    rest = [label for label in frequent if label not in set(kept)]
    counts = []
    for item in stats:
        row = [item.label_counts.get(label, 0) for label in kept]
        if rest:
            row.append(sum(item.label_counts.get(label, 0) for label in rest))
        counts.append(tuple(row))
    return ([*kept, OTHER] if rest else kept), counts
