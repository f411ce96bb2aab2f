"""Clients' sizes, labels and record lengths: ``clients.csv`` and its figure."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedllm_flwr.reporting.plots import PALETTE, figure_file
from fedllm_flwr.reporting.text import one_line, shorten_middle

if TYPE_CHECKING:
    from fedllm_flwr.data.partition import ClientStats

OTHER = "other labels"
TABLE_LABELS = 50  # maximum number of label columns; free text has too many distinct values
_NAMED_CLIENTS = 60  # more names would be illegible
_LABEL_PALETTE = (*PALETTE[:6], "#F0E442", "#999999")


def clients_table(stats: "Sequence[ClientStats]") -> str:
    """``clients.csv``: one row per client; record lengths are in characters over all turns."""
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
    """``clients.csv`` of a deployment, in which only the number of examples is known."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("client", "examples"), *sizes.items()])
    return text.getvalue()


def label_counts(
    stats: "Sequence[ClientStats]", limit: int
) -> tuple[list[str], list[tuple[int, ...]]]:
    """The `limit` most frequent labels, sorted, and their counts per client.

    Further labels are summed as `OTHER`. Records without a label are not counted.
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


def plot_clients(stats: "Sequence[ClientStats]", path: Path) -> None:
    """Figure of the clients' sizes by label and the lengths of their records.

    Raises:
        FederationError: the file cannot be written.
    """
    height = min(max(3.0, 1.5 + 0.24 * len(stats)), 14.0)
    with figure_file(path, (11.0, height)) as figure:
        sizes, lengths = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _plot_sizes(sizes, stats)
        _plot_lengths(lengths, stats)
        sizes.set_ylim(len(stats) - 0.4, -0.6)  # the first client at the top
        if len(stats) <= _NAMED_CLIENTS:
            names = [shorten_middle(one_line(item.name), 28) for item in stats]
            sizes.set_yticks(range(len(stats)), names, fontsize=9 if len(stats) <= 30 else 7.5)
        else:
            sizes.set_ylabel(f"{len(stats)} clients, by number")
        lengths.tick_params(axis="y", length=0)


def _plot_sizes(axis: Any, stats: "Sequence[ClientStats]") -> None:
    labels, counts = label_counts(stats, len(_LABEL_PALETTE))
    rows = np.arange(len(stats))
    height = 0.75 if len(stats) > 3 else 0.4
    if len(labels) < 2:
        axis.barh(rows, [item.num_examples for item in stats], color=PALETTE[0], height=height)
    else:
        table = np.array(counts)  # (clients, labels)
        starts = np.cumsum(table, axis=1) - table
        for i in range(len(labels)):
            axis.barh(
                rows,
                table[:, i],
                left=starts[:, i],
                color=_LABEL_PALETTE[i],
                height=height,
            )
        names = [shorten_middle(one_line(label), 24) for label in labels]
        fitting = max(2, 60 // (4 + max(map(len, names))))
        _legend_below(axis, "left", axis.containers, names, columns=fitting)
    axis.set_title("Records" + (" by label" if len(labels) > 1 else ""), loc="left")
    axis.set_xlabel("training records")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.grid(axis="y", visible=False)


def _plot_lengths(axis: Any, stats: "Sequence[ClientStats]") -> None:
    rows = np.arange(len(stats))
    median = np.array([item.median_length for item in stats])
    longest = np.array([item.max_length for item in stats])
    axis.hlines(rows, median, longest, color="#bbbbbb", linewidth=1.5)
    marks = axis.plot(median, rows, "o", color=PALETTE[0], markersize=5)
    marks += axis.plot(longest, rows, "|", color=PALETTE[1], markersize=8)
    if median.size and longest.max() > 20 * max(1.0, median.min()):
        axis.set_xscale("log")
    else:
        axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_title("Length of a record", loc="left")
    axis.set_xlabel("characters, all turns")
    axis.grid(axis="y", visible=False)
    _legend_below(axis, "right", marks, ["median", "longest"], columns=2)


def _legend_below(
    axis: Any, side: str, artists: Sequence[Any], labels: Sequence[str], columns: int
) -> None:
    """A legend below the figure that includes labels starting with "_"."""
    axis.figure.legend(
        artists,
        labels,
        loc=f"outside lower {side}",
        ncols=min(len(labels), columns),
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.2,
    )
