"""The content of a report as plain data: key figures, then sections of tables and charts."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bar:
    """A number of a table, drawn on its column's scale; `low` and `high` are its interval."""

    text: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Shares:
    """Proportions in a cell, such as a client's labels; `parts` are in the column's order."""

    parts: Sequence[tuple[str, float]]


Cell = str | Bar | Shares


@dataclass(frozen=True)
class Table:
    """A table with a header; the first column contains the row names."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Series:
    """A line of a chart, with a band from `low` to `high` if they are given.

    `color` is the index of a colour, the same for one name in several charts; None: by position.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    color: int | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON values with six significant digits."""
        numbers = {"x": self.x, "y": self.y, "low": self.low, "high": self.high}
        rounded = {key: _rounded(values) for key, values in numbers.items() if values is not None}
        return {"name": self.name, "color": self.color, **rounded}


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis, which is initially logarithmic if `log` is set."""

    title: str
    series: Sequence[Series]
    x_label: str = "round"
    y_label: str = ""
    log: bool = False
    limits: tuple[float, float] | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "title": self.title,
            "xLabel": self.x_label,
            "yLabel": self.y_label,
            "log": self.log,
            "limits": self.limits,
            "series": [series.as_json() for series in self.series],
        }


@dataclass(frozen=True)
class Paragraphs:
    """Paragraphs; with `code`, lines and spaces are preserved."""

    lines: Sequence[str]
    code: bool = False


@dataclass(frozen=True)
class Folded:
    """Collapsed blocks under a heading that expands them."""

    title: str
    blocks: "Sequence[Block]"


Block = Table | Chart | Paragraphs | Folded


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; sections without blocks are not shown."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Figure:
    """A key figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report; `headline` is its main result in one sentence."""

    title: str
    subtitle: str
    headline: str
    figures: Sequence[Figure] = ()
    sections: Sequence[Section] = field(default_factory=list)


def spans_decades(series: Iterable[Series], factor: float = 4.0) -> bool:
    """Whether the ratio of positive values exceeds `factor`: a linear axis would flatten them."""
    values = [value for line in series for value in line.y if value is not None]
    return bool(values) and min(values) > 0 and max(values) > factor * min(values)


def _rounded(values: Sequence[float | None]) -> list[float | int | None]:
    return [
        None
        if value is None or not math.isfinite(value)
        else value
        if isinstance(value, int)
        else float(f"{value:.6g}")
        for value in values
    ]
