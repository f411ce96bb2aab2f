"""Renders a page as one self-contained HTML file with a strict content security policy."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fedllm_flwr import __version__
from fedllm_flwr.reporting.html.page import (
    Bar,
    Block,
    Cell,
    Chart,
    Page,
    Paragraphs,
    Shares,
    Table,
)

_ASSETS = Path(__file__).parents[2] / "assets" / "report"
_NUM_COLORS = 10  # of --c0, --c1, ... in report.css
_SCALE = 100.0  # width of a drawn cell, in units of its viewBox
Charts = dict[str, dict[str, Any]]  # chart data by element id


class Html(str):
    """Text that is already HTML; `_tag` escapes all other text."""


def render(page: Page, version: int | None = None) -> str:
    """The whole file; with a `version`, it is a live page that requests updates from its server."""
    style, script = _asset("report.css"), _asset("report.js")
    live = version is not None
    connect = "'self'" if live else "'none'"
    policy = (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    body, charts = render_body(page)
    return Template(_asset("report.html")).substitute(
        policy=policy,
        title=_escaped(page.title),
        live=f' data-version="{version}"' if live else "",
        needs="" if live else " This file needs nothing else and sends nothing.",
        style=style,
        script=script,
        body=body,
        charts=as_script_data(charts),
        version=_escaped(__version__),
    )


def render_body(page: Page) -> tuple[str, Charts]:
    """The page's body, and the data of its charts by element id."""
    charts: Charts = {}
    sections = [section for section in page.sections if section.blocks]
    figures = [
        _tag("div", _tag("dt", item.label), _tag("dd", item.value, _tag("small", item.note)))
        for item in page.figures
    ]
    links = [_tag("a", item.title, href=f"#{_slug(item.title)}") for item in sections]
    head = [
        _tag("p", page.subtitle, class_="subtitle"),
        _tag("h1", page.title),
        _tag("p", page.headline, class_="headline"),
        _tag("dl", *figures, class_="figures"),
    ]
    main = [
        _tag(
            "section",
            _tag("h2", item.title, id=f"{_slug(item.title)}-title"),
            *_blocks(item.blocks, _slug(item.title), charts),
            id=_slug(item.title),
            aria_labelledby=f"{_slug(item.title)}-title",
        )
        for item in sections
    ]
    parts = [
        _tag("header", *head, id="head"),
        _tag("nav", *links, id="contents", aria_label="Contents"),
        _tag("main", *main, id="main"),
    ]
    return "\n".join(parts), charts


def as_script_data(value: Any) -> str:
    """JSON for a script element of type application/json, which its text cannot close."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _blocks(blocks: Sequence[Block], place: str, charts: Charts) -> list[Html]:
    return [_block(block, f"{place}-{i}", charts) for i, block in enumerate(blocks)]


def _block(block: Block, place: str, charts: Charts) -> Html:
    """A block as HTML; `place` is its element's id."""
    if isinstance(block, Table):
        return _table(block, place)
    if isinstance(block, Chart):
        charts[place] = block.as_json()
        caption = _tag("figcaption", block.title, _tag("small", block.y_label))
        note = [_tag("p", block.note, class_="note")] if block.note else []
        return _tag("figure", caption, _tag("div", class_="plot"), *note, id=place)
    if isinstance(block, Paragraphs):
        if block.code:
            return _tag("pre", _tag("code", "\n".join(block.lines)), tabindex="0")
        return Html("".join(_tag("p", line) for line in block.lines))
    inner = _blocks(block.blocks, place, charts)
    return _tag("details", _tag("summary", block.title), *inner, id=place)


def _table(table: Table, place: str) -> Html:
    columns = range(len(table.header))
    numeric = [all(_is_number(row[i]) for row in table.rows) for i in columns]
    labels = [sorted_labels(table.rows, i) for i in columns]
    head = [
        _tag("th", title, scope="col", class_="number" if number else None) if title else _tag("td")
        for title, number in zip(table.header, numeric, strict=True)
    ]
    body = []
    for row in table.rows:
        cells = [_tag("th", _cell(row[0], table, 0, labels[0]), scope="row")]
        for i in columns[1:]:
            kind = "number" if numeric[i] else None
            cells.append(_tag("td", _cell(row[i], table, i, labels[i]), class_=kind))
        body.append(_tag("tr", *cells))
    caption = [_tag("caption", table.title)] if table.title else []
    whole = _tag("table", *caption, _tag("thead", _tag("tr", *head)), _tag("tbody", *body))
    name = table.title or f"table {place.replace('-', ' ')}"
    parts = [_tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=name)]
    parts += [_legend(names) for names in labels if names]
    parts += [_tag("p", table.note, class_="note")] if table.note else []
    return _tag("div", *parts, id=place)


def sorted_labels(rows: Sequence[Sequence[Cell]], column: int) -> list[str]:
    """Part names of a column's `Shares`, in order."""
    cells = [row[column] for row in rows]
    return list(dict.fromkeys(n for c in cells if isinstance(c, Shares) for n, _ in c.parts))


def _cell(cell: Cell, table: Table, column: int, labels: Sequence[str]) -> "str | Html":
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Shares):
        return _shares(cell, labels)
    bars = [row[column] for row in table.rows]
    ends = [0.0]
    for bar in bars:
        if isinstance(bar, Bar):
            ends += [end for end in (bar.low, bar.value, bar.high) if end is not None]
    first, span = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> float:
        return round(_SCALE * (value - first) / span, 2)

    zero, end = place(0.0), place(cell.value)
    drawn = [_tag("rect", x=min(zero, end), y=3, width=abs(end - zero), height=8, class_="bar")]
    if cell.low is not None and cell.high is not None:
        drawn.append(_tag("path", d=f"M{place(cell.low)} 7H{place(cell.high)}", class_="whisker"))
    drawn.append(_tag("path", d=f"M{zero} 0V14", class_="zero"))
    picture = _tag(
        *("svg", *drawn),
        viewBox="0 0 100 14",
        preserveAspectRatio="none",
        aria_hidden="true",
        class_="drawn",
    )
    return Html(_tag("span", cell.text) + picture)


def _shares(cell: Shares, labels: Sequence[str]) -> Html:
    total = sum(count for _, count in cell.parts) or 1.0
    drawn, start = [], 0.0
    for name, count in cell.parts:
        width = _SCALE * count / total
        color = f"fill{labels.index(name) % _NUM_COLORS}"
        drawn.append(
            _tag("rect", x=f"{start:.2f}", y=0, width=f"{width:.2f}", height=14, class_=color)
        )
        start += width
    said = ", ".join(f"{name} {count / total:.0%}" for name, count in cell.parts if count)
    return _tag(
        *("svg", _tag("title", said), *drawn),
        viewBox="0 0 100 14",
        preserveAspectRatio="none",
        role="img",
        aria_label=said,
        class_="drawn shares",
    )


def _legend(names: Sequence[str]) -> Html:
    keys = [_tag("li", name, class_=f"key{i % _NUM_COLORS}") for i, name in enumerate(names)]
    return _tag("ul", *keys, class_="legend")


def _is_number(cell: Cell) -> bool:
    """Whether a cell is right-aligned."""
    return isinstance(cell, str) and bool(re.match(r"[-+]?\d|-$|$", cell.strip()))


def _tag(name: str, *children: str, **attributes: Any) -> Html:
    """An element; text other than `Html` is escaped, and attributes of None are omitted."""
    pairs = {key.strip("_").replace("_", "-"): value for key, value in attributes.items()}
    given = "".join(f' {k}="{_escaped(str(v))}"' for k, v in pairs.items() if v is not None)
    inner = "".join(child if isinstance(child, Html) else _escaped(child) for child in children)
    return Html(f"<{name}{given}>{inner}</{name}>")


def _escaped(text: str) -> str:
    """Text with markup escaped, and without characters that change the display of other text."""
    return escape("".join(char if char.isprintable() or char == "\n" else " " for char in text))


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"


@cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text("utf-8")


def _source(text: str) -> str:
    """The source expression of an inline style or script (CSP level 2)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
