"""Figures of a run as PNG files. Matplotlib is imported when the first one is drawn."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.files import write_atomically
from fedllm_flwr.reporting.clients import label_counts
from fedllm_flwr.reporting.metrics import Record
from fedllm_flwr.reporting.text import one_line, shorten, shorten_middle

if TYPE_CHECKING:
    from fedllm_flwr.data.partition import ClientStats

# Okabe and Ito (2008), told apart with any kind of colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
Curve = Sequence[tuple[int, float, float, float]]  # (round, mean, low, high)


@dataclass(frozen=True)
class _Panel:
    """Scores on held-out records that share an axis; drawn where the first of them is known."""

    title: str
    unit: str
    keys: tuple[str, ...]
    limits: tuple[float, float] | None = None


_SCORE_PANELS = (
    _Panel("Answers on held-out records", "share (0 to 1)", ("accuracy", "macro_f1"), (0, 1)),
    _Panel("Rewards of held-out answers", "nats", ("margin", "chosen_reward", "rejected_reward")),
)
_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "font.size": 10,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}
_MARKED_ROUNDS = 30  # more points than this make a line, not marks
_NAMED_CLIENTS = 60  # more names than this cannot be read
_LINE_PALETTE = (*PALETTE, "#000000", "#8C510A", "#6A3D9A")
_FLAT = 4.0  # times the lowest value: the highest one from which an axis is logarithmic
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1)), (0, (8, 3)))
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_LABEL_PALETTE = (*PALETTE[:6], "#F0E442", "#999999")


def plot_curves(records: Sequence[Record], path: Path, title: str) -> None:
    """Loss per round, in training and on held-out records; shares and rewards where known.

    Raises:
        FederationError: the file cannot be written.
    """
    panels = [panel for panel in _SCORE_PANELS if _series(records, "eval", panel.keys[0])]
    with figure_file(path, (6.5 + 4.0 * len(panels), 4.0)) as figure:
        figure.suptitle(shorten(one_line(title), 100), fontsize=12)
        axes = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
        _plot_losses(axes[0], records)
        for axis, panel in zip(axes[1:], panels, strict=True):
            _plot_scores(axis, panel, records)
        for axis in axes:
            _round_axis(axis)


def plot_comparison(
    curves: Mapping[str, Curve],
    path: Path,
    ylabel: str = "loss on held-out records (nats/token)",
    caption: str = "",
) -> None:
    """One line per name with its spread, such as the algorithms of a comparison.

    Names stand at the ends of their lines. Each line has a colour, dashes and marks of its own and
    is thinner than those below it, so that one that lies on another is seen. The axis is
    logarithmic where the start would flatten the rest.

    Args:
        caption: what lines and bands are; below the axes.

    Raises:
        FederationError: the file cannot be written.
    """
    with figure_file(path, (8.0, 5.0)) as figure:
        axis = figure.subplots()
        ends: list[tuple[float, float, str, str]] = []
        for i, (name, curve) in enumerate(curves.items()):
            rounds, mean, low, high = np.array(curve, dtype=float).reshape(-1, 4).T
            color = _LINE_PALETTE[i % len(_LINE_PALETTE)]
            depth = i / max(1, len(curves) - 1)  # 0: drawn first, 1: last
            axis.plot(
                rounds,
                mean,
                color=color,
                linestyle=_DASHES[i % len(_DASHES)],
                linewidth=3.2 - 2.0 * depth,
                **_own_marks(i, len(curve), 7.5 - 3.5 * depth),
            )
            axis.fill_between(rounds, low, high, color=color, alpha=0.12, linewidth=0)
            if len(curve):
                ends.append((rounds[-1], mean[-1], shorten(one_line(name), 30), color))
        values = [np.array(curve, dtype=float).reshape(-1, 4) for curve in curves.values()]
        if _flattened(values):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.get_minor_locator().set_params(subs=(2, 5))
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.tick_params(axis="y", which="minor", labelsize=8)
            axis.grid(True, axis="y", which="minor", color="#eeeeee", linewidth=0.5)
            ylabel += ", log scale"
        axis.set_ylabel(ylabel)
        _round_axis(axis)
        if caption:
            figure.supxlabel(caption, fontsize=8.5, color="#444444", wrap=True)
        _label_ends(axis, ends)


def _own_marks(index: int, points: int, size: float) -> dict[str, Any]:
    """The marks of a line: hollow, and on a few points only where there are many."""
    return {
        "marker": _MARKS[index % len(_MARKS)],
        "markersize": size,
        "markerfacecolor": "none",
        "markeredgewidth": 1.2,
        "markevery": max(1, points // 12),
    }


def _flattened(curves: Sequence[NDArray[np.float64]]) -> bool:
    """Whether the highest value of (round, mean, low, high) would flatten the lowest ones."""
    values = [curve for curve in curves if len(curve)]
    if not values:
        return False
    lowest = min(float(curve[:, 1:].min()) for curve in values)
    return lowest > 0 and max(float(curve[:, 1].max()) for curve in values) > _FLAT * lowest


def _label_ends(axis: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names to the right of the ends of lines, moved apart where they would overlap."""
    figure = axis.figure
    figure.draw_without_rendering()
    height = 10.5 * figure.dpi / 72  # pixels of a line of text
    placed = sorted((axis.transData.transform((x, y))[1], x, y, n, c) for x, y, n, c in ends)
    heights = [pixel for pixel, *_ in placed]
    for _ in range(200):  # neighbours that overlap push each other apart
        for i in range(1, len(heights)):
            missing = height - (heights[i] - heights[i - 1])
            if missing > 0:
                heights[i - 1] -= missing / 2
                heights[i] += missing / 2
    for wanted, (pixel, x, y, name, color) in zip(heights, placed, strict=True):
        axis.annotate(
            name,
            xy=(x, y),
            xytext=(14, (wanted - pixel) * 72 / figure.dpi),
            textcoords="offset points",
            color=color,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5)},
        )


def plot_clients(stats: "Sequence[ClientStats]", path: Path) -> None:
    """Clients' sizes, divided by label, and the lengths of their records.

    Raises:
        FederationError: the file cannot be written.
    """
    height = min(max(3.0, 1.5 + 0.24 * len(stats)), 14.0)
    with figure_file(path, (11.0, height)) as figure:
        sizes, lengths = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _plot_sizes(sizes, stats)
        _plot_lengths(lengths, stats)
        _client_axis(sizes, stats)
        lengths.tick_params(axis="y", length=0)


@contextmanager
def figure_file(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure that is drawn without a display and written to `path` when the block ends."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # font cache, missing home directory
    import matplotlib
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.rc_context(_STYLE):
        warnings.filterwarnings("ignore", message="Glyph")  # names in scripts the font lacks
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        image = io.BytesIO()
        figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())


def _series(records: Sequence[Record], section: str, key: str) -> list[tuple[int, float]]:
    """(round, value) of the rounds that have one."""
    found = ((item["round"], (item.get(section) or {}).get(key)) for item in records)
    return [(number, float(value)) for number, value in found if value is not None]


def _plot_losses(axis: Any, records: Sequence[Record]) -> None:
    trained = [item for item in records if item.get("loss") is not None]
    rounds = [item["round"] for item in trained]
    spreads = [_client_range(item) for item in trained]
    blue, orange, green = PALETTE[:3]
    if trained:
        axis.plot(
            rounds,
            [item["loss"] for item in trained],
            color=blue,
            label="training, mean of clients",
            **_marks(len(trained)),
        )
    if any(high > low for low, high in spreads):
        low, high = zip(*spreads, strict=True)
        label = "training, lowest to highest client"
        axis.fill_between(rounds, low, high, color=blue, alpha=0.18, linewidth=0, label=label)
        if len(trained) == 1:  # an area of one round has no width
            axis.vlines(rounds, low, high, color=blue, alpha=0.4, linewidth=4)
    for section, name, color, style in (
        ("eval", "held-out records", orange, "-"),
        ("client_eval", "clients' own held-out records", green, "--"),
    ):
        if series := _series(records, section, "loss"):
            axis.plot(
                *zip(*series, strict=True), style, color=color, label=name, **_marks(len(series))
            )
    axis.set_title("Loss", loc="left")
    axis.set_ylabel("loss" if _series(records, "eval", "margin") else "loss (nats/token)")
    if axis.has_data():
        axis.legend(fontsize=9)


def _client_range(record: Record) -> tuple[float, float]:
    """Lowest and highest training loss among the clients of a round."""
    values = [item.get("loss") for item in (record.get("clients") or {}).values()]
    losses = [value for value in values if value is not None] or [record["loss"]]
    return min(losses), max(losses)


def _plot_scores(axis: Any, panel: _Panel, records: Sequence[Record]) -> None:
    for key, color, style in zip(panel.keys, PALETTE[1:], ("-", "--", ":"), strict=False):
        if series := _series(records, "eval", key):
            name, marks = key.replace("_", " ").replace("f1", "F1"), _marks(len(series))
            axis.plot(*zip(*series, strict=True), style, color=color, label=name, **marks)
    if panel.limits:
        axis.set_ylim(*panel.limits)
    axis.set_title(panel.title, loc="left")
    axis.set_ylabel(panel.unit)
    axis.legend(fontsize=9, loc="best")


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


def _client_axis(axis: Any, stats: "Sequence[ClientStats]") -> None:
    """Clients from top to bottom, named while there is room, by number otherwise."""
    axis.set_ylim(len(stats) - 0.4, -0.6)
    if len(stats) <= _NAMED_CLIENTS:
        names = [shorten_middle(one_line(item.name), 28) for item in stats]
        axis.set_yticks(range(len(stats)), names, fontsize=9 if len(stats) <= 30 else 7.5)
    else:
        axis.set_ylabel(f"{len(stats)} clients, by number")


def _round_axis(axis: Any) -> None:
    axis.set_xlabel("round")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _legend_below(
    axis: Any, side: str, artists: Sequence[Any], labels: Sequence[str], columns: int
) -> None:
    """A legend at the foot of the figure; names that begin with "_" appear, too."""
    axis.figure.legend(
        artists,
        labels,
        loc=f"outside lower {side}",
        ncols=min(len(labels), columns),
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _legend_outside(axis: Any) -> None:
    if axis.has_data():
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)


def _marks(points: int) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4} if points <= _MARKED_ROUNDS else {"linewidth": 1.2}
