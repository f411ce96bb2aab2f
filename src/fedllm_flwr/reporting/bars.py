"""Bars of scores side by side, with their intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm_flwr.reporting.plots import PALETTE, figure_file
from fedllm_flwr.reporting.text import one_line, shorten

Bar = tuple[float, float, float]  # value, low, high
_MORE = ("#F0E442", "#999999", "#332288", "#88CCEE", "#44AA99", "#AA4499")
_COLORS = (*PALETTE, *_MORE)


def plot_bars(
    names: Sequence[str],
    groups: Mapping[str, Sequence[Bar | None]],
    chances: Sequence[float | None],
    path: Path,
    title: str,
) -> None:
    """One group of bars for each name, one bar in it for each model.

    Args:
        names: of the groups, such as tasks.
        groups: by model, a bar for each group; None where there is no score.
        chances: what guessing yields, drawn as a dashed line; None where that is not known.

    Raises:
        FederationError: the file cannot be written.
    """
    width = 0.8 / max(1, len(groups))
    size = (max(6.0, 1.2 + len(names) * (0.5 + 0.22 * len(groups))), 4.5)
    with figure_file(path, size) as figure:
        axis = figure.subplots()
        for i, (model, bars) in enumerate(groups.items()):
            shift = (i - (len(groups) - 1) / 2) * width
            known = {place + shift: bar for place, bar in enumerate(bars) if bar is not None}
            _draw(axis, known, width, model, _COLORS[i % len(_COLORS)])
        for place, chance in enumerate(chances):
            if chance is not None:
                axis.hlines(chance, place - 0.45, place + 0.45, colors="#444444", linestyles="--")
        labels = [shorten(name, 24) for name in names]
        axis.set_xticks(range(len(names)), labels, rotation=20, ha="right")
        axis.set_title(shorten(one_line(title), 100), loc="left")
        axis.set_ylabel("score, with its 95 % interval")
        axis.grid(axis="x", visible=False)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)


def _draw(axis: Any, bars: Mapping[float, Bar], width: float, model: str, color: str) -> None:
    """The bars of one model, by place."""
    if not bars:
        return
    values, lows, highs = zip(*bars.values(), strict=True)
    below = [max(0.0, value - low) for value, low in zip(values, lows, strict=True)]
    above = [max(0.0, high - value) for value, high in zip(values, highs, strict=True)]
    axis.bar(
        list(bars),
        values,
        width * 0.92,
        yerr=[below, above],
        color=color,
        label=shorten(one_line(model.strip()), 30),
        error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
    )
