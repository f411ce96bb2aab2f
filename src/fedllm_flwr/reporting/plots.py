"""Figures as PNG files. Matplotlib is imported when the first figure is drawn."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.files import write_atomically
from fedllm_flwr.reporting.measures import (
    DRIFT,
    ClientSpread,
    client_spread,
    costs,
    deciding_score,
    unrelated_cosine,
)
from fedllm_flwr.reporting.metrics import RoundRecord
from fedllm_flwr.reporting.text import one_line, shorten
from fedllm_flwr.tasks.base import Panel, TrainingTask

# Okabe and Ito (2008): distinguishable with any kind of colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
Curve = Sequence[tuple[float, float, float, float]]  # (round or cost, mean, low, high)
ScoreBar = tuple[float, float, float]  # value, low, high


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
    "text.parse_math": False,  # dollar signs in names are no math
}
_MARKED_ROUNDS = 30  # lines with more points are drawn without markers
_LINE_PALETTE = (*PALETTE, "#000000", "#8C510A", "#6A3D9A")
_BAR_PALETTE = (
    *PALETTE,
    "#F0E442",
    "#999999",
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#AA4499",
    "#000000",
)
_FLAT = 4.0  # above this ratio of highest to lowest value, the axis is logarithmic
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1)), (0, (8, 3)))
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


def plot_curves(records: Sequence[RoundRecord], path: Path, title: str, task: TrainingTask) -> None:
    """Figure of loss and scores by round, score against cost, client drift and fairness.

    Raises:
        FederationError: the file cannot be written.
    """
    drawn: list[Callable[[Any], None]] = [
        lambda axis: _plot_losses(axis, records, task.loss_unit),
        *(
            partial(_plot_scores, panel=panel, records=records)
            for panel in task.panels
            if _series(records, "eval", panel.keys[0])
        ),
    ]
    score = deciding_score(records)
    scored = [
        (i, r["eval"][score]) for i, r in enumerate(records) if score in (r.get("eval") or {})
    ]
    for label, spent in costs(records).items():
        if len(scored) > 1 and spent[-1] > 0:
            points = [(spent[i], value) for i, value in scored]
            drawn.append(partial(_plot_cost, points=points, score=score, label=label))
    if errors := [
        (r["round"], r["aggregation_error"]) for r in records if "aggregation_error" in r
    ]:
        drawn.append(partial(_plot_errors, errors=errors))
    for key in DRIFT:
        if values := [(r["round"], [*r[key].values()]) for r in records if r.get(key)]:
            drawn.append(partial(_plot_drift, key=key, values=values))
    if spreads := [(r["round"], found) for r in records if (found := client_spread(r))]:
        drawn.append(partial(_plot_fairness, spreads=spreads))
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    with figure_file(path, (2.5 + 4.0 * columns, 4.0 * rows)) as figure:
        figure.suptitle(shorten(one_line(title), 100), fontsize=12)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, draw in zip(axes, drawn, strict=False):
            axis.set_xlabel("round")
            axis.xaxis.get_major_locator().set_params(integer=True)
            draw(axis)
        for axis in axes[len(drawn) :]:
            axis.set_axis_off()


def plot_comparison(
    curves: Mapping[str, Curve],
    path: Path,
    ylabel: str = "loss on held-out records (nats/token)",
    caption: str = "",
    xlabel: str = "round",
) -> None:
    """Figure with one line and band per name, such as the algorithms of a comparison.

    Names are written at the line ends. Lines differ in colour, dashes and markers, and later lines
    are thinner, so coinciding lines stay visible. The axis is logarithmic if the values before
    training would flatten the rest.

    Args:
        caption: text below the axes.

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
                marker=_MARKS[i % len(_MARKS)],
                markersize=7.5 - 3.5 * depth,
                markerfacecolor="none",
                markeredgewidth=1.2,
                markevery=max(1, len(curve) // 12),
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
        axis.set_xlabel(xlabel)
        axis.xaxis.get_major_locator().set_params(integer=xlabel == "round")
        if caption:
            figure.supxlabel(caption, fontsize=8.5, color="#444444", wrap=True)
        _label_ends(axis, ends)


def _flattened(curves: Sequence[NDArray[np.float64]]) -> bool:
    """Whether the values of (round, mean, low, high) span more than `_FLAT` times the lowest."""
    values = [curve for curve in curves if len(curve)]
    if not values:
        return False
    lowest = min(float(curve[:, 1:].min()) for curve in values)
    return lowest > 0 and max(float(curve[:, 1].max()) for curve in values) > _FLAT * lowest


def _label_ends(axis: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names to the right of the line ends, moved apart to avoid overlaps."""
    figure = axis.figure
    figure.draw_without_rendering()
    height = 10.5 * figure.dpi / 72  # pixels of a line of text
    placed = sorted((axis.transData.transform((x, y))[1], x, y, n, c) for x, y, n, c in ends)
    heights = [pixel for pixel, *_ in placed]
    for _ in range(200):  # overlapping neighbours are moved apart
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


def plot_bars(
    names: Sequence[str],
    groups: Mapping[str, Sequence[ScoreBar | None]],
    chances: Sequence[float | None],
    path: Path,
    title: str,
) -> None:
    """Figure with one group of bars per name (such as a task), and one bar per model.

    Args:
        names: names of the groups.
        groups: model -> one bar per group; None without a score.
        chances: chance level of each group, drawn as a dashed line; None if unknown.

    Raises:
        FederationError: the file cannot be written.
    """
    width = 0.8 / max(1, len(groups))
    size = (max(6.0, 1.2 + len(names) * (0.5 + 0.22 * len(groups))), 4.5)
    with figure_file(path, size) as figure:
        axis = figure.subplots()
        for i, (model, bars) in enumerate(groups.items()):
            shift = (i - (len(groups) - 1) / 2) * width
            known = [(place + shift, *bar) for place, bar in enumerate(bars) if bar is not None]
            if known:
                places, values, lows, highs = np.array(known, dtype=float).T
                axis.bar(
                    places,
                    values,
                    width * 0.92,
                    yerr=np.maximum([values - lows, highs - values], 0.0),
                    color=_BAR_PALETTE[i % len(_BAR_PALETTE)],
                    label=shorten(one_line(model.strip()), 30),
                    error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
                )
        values = [bar[0] for bars in groups.values() for bar in bars if bar is not None]
        if values and min(values) >= 0 and max(values) <= 1:  # few seeds: wider than the scale
            low, high = axis.get_ylim()
            axis.set_ylim(max(low, 0.0), min(high, 1.0))
        for place, chance in enumerate(chances):
            if chance is not None:
                axis.hlines(chance, place - 0.45, place + 0.45, colors="#444444", linestyles="--")
        labels = [shorten(name, 24) for name in names]
        axis.set_xticks(range(len(names)), labels, rotation=20, ha="right")
        axis.set_title(shorten(one_line(title), 100), loc="left")
        axis.set_ylabel("score, with its 95 % interval")
        axis.grid(axis="x", visible=False)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)


@contextmanager
def figure_file(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure, drawn without a display and written to `path` when the context exits."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # font cache, missing home directory
    import matplotlib
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.rc_context(_STYLE):
        warnings.filterwarnings("ignore", message="Glyph")  # characters missing in the font
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        image = io.BytesIO()
        figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())


def _series(records: Sequence[RoundRecord], section: str, key: str) -> list[tuple[int, float]]:
    """(round, value) of the rounds that have this value."""
    found = ((item["round"], (item.get(section) or {}).get(key)) for item in records)
    return [(number, float(value)) for number, value in found if value is not None]


def _plot_losses(axis: Any, records: Sequence[RoundRecord], unit: str) -> None:
    trained = [item for item in records if item.get("loss") is not None]
    rounds = [item["round"] for item in trained]
    spreads = []  # lowest and highest training loss among the clients of each round
    for item in trained:
        losses = [client.get("loss") for client in (item.get("clients") or {}).values()]
        known = [loss for loss in losses if loss is not None] or [item["loss"]]
        spreads.append((min(known), max(known)))
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
        if len(trained) == 1:  # a band over one round has no width
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
    axis.set_ylabel(f"loss ({unit})" if unit else "loss")
    if axis.has_data():
        axis.legend(fontsize=9)


def _plot_scores(axis: Any, panel: Panel, records: Sequence[RoundRecord]) -> None:
    for key, color, style in zip(panel.keys, PALETTE[1:], ("-", "--", ":"), strict=False):
        if series := _series(records, "eval", key):
            name, marks = key.replace("_", " ").replace("f1", "F1"), _marks(len(series))
            axis.plot(*zip(*series, strict=True), style, color=color, label=name, **marks)
    if panel.limits:
        axis.set_ylim(*panel.limits)
    axis.set_title(panel.title, loc="left")
    axis.set_ylabel(panel.unit)
    axis.legend(fontsize=9, loc="best")


def _plot_errors(axis: Any, errors: Sequence[tuple[int, float]]) -> None:
    axis.plot(*zip(*errors, strict=True), color=PALETTE[3], **_marks(len(errors)))
    axis.set_ylim(bottom=0)
    axis.set_title("Aggregation error", loc="left")
    axis.set_ylabel("distance / norm of the mean product BA")


def _plot_cost(axis: Any, points: Sequence[tuple[float, float]], score: str, label: str) -> None:
    axis.plot(*zip(*points, strict=True), color=PALETTE[1], **_marks(len(points)))
    if score == "loss" and min(value for _, value in points) > 0:
        axis.set_yscale("log")
    axis.set_title(f"{score.capitalize()} against {label.split()[0]}", loc="left")
    axis.set_xlabel(label)
    axis.set_ylabel(f"{score} on held-out records")


def _plot_band(axis: Any, rounds: Sequence[int], values: Sequence[Sequence[float]]) -> None:
    """The mean over clients, and a band from the lowest to the highest."""
    mean, low, high = ([choose(each) for each in values] for choose in (fmean, min, max))
    axis.plot(rounds, mean, color=PALETTE[0], label="mean of clients", **_marks(len(rounds)))
    label = "lowest to highest client"
    axis.fill_between(rounds, low, high, color=PALETTE[0], alpha=0.18, linewidth=0, label=label)


def _plot_drift(axis: Any, key: str, values: Sequence[tuple[int, Sequence[float]]]) -> None:
    rounds = [number for number, _ in values]
    _plot_band(axis, rounds, [each for _, each in values])
    if key == "update_cosine":
        unrelated = [unrelated_cosine(len(each)) for _, each in values]
        axis.plot(rounds, unrelated, ":", color=PALETTE[6], label="unrelated directions")
        axis.set_title("Client drift", loc="left")
        axis.set_ylabel("cosine of an update to the round's mean")
    else:
        axis.set_ylim(bottom=0)
        axis.set_title("Size of the updates", loc="left")
        axis.set_ylabel("norm of an update")
    axis.legend(fontsize=9)


def _plot_fairness(axis: Any, spreads: Sequence[tuple[int, ClientSpread]]) -> None:
    rounds = [number for number, _ in spreads]
    _plot_band(axis, rounds, [[*spread.values.values()] for _, spread in spreads])
    worst = [spread.worst for _, spread in spreads]
    axis.plot(rounds, worst, "--", color=PALETTE[1], label="worst client", **_marks(len(rounds)))
    metric = spreads[-1][1].metric
    if metric == "loss" and min(min(spread.values.values()) for _, spread in spreads) > 0:
        axis.set_yscale("log")
    axis.set_title("Fairness", loc="left")
    axis.set_ylabel(f"{metric.replace('_', ' ')} of each client")
    axis.legend(fontsize=9)


def _marks(points: int) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4} if points <= _MARKED_ROUNDS else {"linewidth": 1.2}
