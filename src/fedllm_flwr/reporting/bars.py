"""Bars of scores side by side, with their intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedllm_flwr.reporting.plots import PALETTE, figure_file
from fedllm_flwr.reporting.text import one_line, shorten

Bar = tuple[float, float, float]  # value, low, high
_EXTRA = ("#F0E442", "#999999", "#332288", "#88CCEE", "#44AA99", "#AA4499")


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
    colors = [*PALETTE, *_EXTRA]
    width = 0.8 / max(1, len(groups))
    size = (max(6.0, 1.2 + len(names) * (0.5 + 0.22 * len(groups))), 4.5)
    with figure_file(path, size) as figure:
        axis = figure.subplots()
        places = np.arange(len(names))
        for i, (model, bars) in enumerate(groups.items()):
            known = [(place, bar) for place, bar in zip(places, bars, strict=True) if bar]
            if not known:
                continue
            at = [place + (i - (len(groups) - 1) / 2) * width for place, _ in known]
            values = [bar[0] for _, bar in known]
            below = [max(0.0, bar[0] - bar[1]) for _, bar in known]
            above = [max(0.0, bar[2] - bar[0]) for _, bar in known]
            axis.bar(
                at,
                values,
                width * 0.92,
                yerr=[below, above],
                color=colors[i % len(colors)],
                label=shorten(one_line(model.strip()), 30),
                error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
            )
        for place, chance in zip(places, chances, strict=True):
            if chance is not None:
                axis.hlines(chance, place - 0.45, place + 0.45, colors="#444444", linestyles="--")
        axis.set_xticks(places, [shorten(name, 24) for name in names], rotation=20, ha="right")
        axis.set_title(shorten(one_line(title), 100), loc="left")
        axis.set_ylabel("score, with its 95 % interval")
        axis.grid(axis="x", visible=False)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
