"""Reports as HTML: nothing from outside becomes markup, the policy holds, colours are legible."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.commands.evaluate.page import evaluation_page
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import changed
from fedllm_flwr.reporting.html import render as rendering
from fedllm_flwr.reporting.html.page import Chart, Page, Section, Series, Table
from fedllm_flwr.reporting.html.render import render
from fedllm_flwr.reporting.html.run import RunFacts, run_page

HOSTILE = "</script></style><img src=x onerror=alert(1)>\"'&${style}\u202eend"
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "a", "div", "footer", "script", "header"),
    *("p", "h1", "h2", "dl", "dt", "dd", "small", "nav", "main", "section", "table", "caption"),
    *("thead", "tbody", "tr", "th", "td", "figure", "figcaption", "details", "summary", "pre"),
    *("code", "span", "svg", "rect", "path", "ul", "li"),
}


class Seen(HTMLParser):
    """Tags, attributes, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.raw: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("script", "style") and data.strip():
            self.raw.append((self.tags[-1], data))
        self.text += data


def record(number: int, **more: Any) -> dict[str, Any]:
    client = {"loss": 2.0 / number, "num_examples": 10, HOSTILE: 1.0}
    return {
        "round": number,
        "loss": 2.0 / number,
        "seconds": 3.0,
        "bytes_up": 10**6,
        "bytes_down": 10**6,
        "clients": {HOSTILE: client, "b": {"loss": 4.0 / number, "num_examples": 10}},
        "failures": {HOSTILE: HOSTILE},
        "ignored": [HOSTILE],
        "eval": {"loss": 3.0 / number, "accuracy": 1 - 0.5 / number},
        "client_eval": {"loss": 1.0, "clients": {HOSTILE: {"loss": 1.5}, "b": {"loss": 0.5}}},
        **more,
    }


def hostile_run() -> Page:
    config = changed(Config(), data={"name": HOSTILE}, model={"name": HOSTILE})
    return run_page(
        RunFacts(
            name=HOSTILE,
            config=config,
            records=[record(1), record(2, **{HOSTILE: 1.0}), record(3, **{HOSTILE: 2.0})],
            clients=[{"client": HOSTILE, "examples": HOSTILE, f"label:{HOSTILE}": "3"}],
            changed={HOSTILE: (HOSTILE, HOSTILE)},
            environment={HOSTILE: HOSTILE},
            digests={HOSTILE: HOSTILE},
            yaml=HOSTILE,
        )
    )


def hostile_evaluation() -> Page:
    score = {"suite": HOSTILE, "task": HOSTILE, "metric": HOSTILE, "model": HOSTILE}
    numbers = {"headline": True, "value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.3}
    about = {
        "results": [{**score, **numbers, "examples": 3}],
        "tables": [[HOSTILE, [[HOSTILE], [HOSTILE]]]],
        "every_metric": [[HOSTILE], [HOSTILE]],
        "tasks": {HOSTILE: {"title": HOSTILE}},
        "first_prompts": {HOSTILE: HOSTILE},
        "notes": [HOSTILE],
    }
    sample = {"id": HOSTILE, "target": HOSTILE, "answer": HOSTILE, HOSTILE: 1.0}
    return evaluation_page(HOSTILE, about, {HOSTILE: {HOSTILE: [sample]}})


@pytest.mark.parametrize("page", [hostile_run(), hostile_evaluation()], ids=["run", "evaluation"])
def test_nothing_from_outside_becomes_markup(page: Page) -> None:
    seen = Seen(render(page))

    assert set(seen.tags) <= TAGS
    assert seen.tags.count("script") == 2
    handlers = [name for _, name, _ in seen.attributes if name.startswith("on") or name == "style"]
    assert handlers == []
    assert "onerror=alert(1)" in seen.text  # shown, as text
    assert "\u202e" not in seen.text
    links = [value for _, name, value in seen.attributes if name in ("href", "src", "action")]
    assert all(link and link.startswith("#") for link in links)
    charts = json.loads(next(text for tag, text in seen.raw if tag == "script"))
    for chart in charts.values():
        assert {"title", "series"} <= chart.keys()


def test_policy_names_the_style_and_the_script_and_nothing_else() -> None:
    page = render(hostile_run())
    seen = Seen(page)
    policy = next(v for t, n, v in seen.attributes if t == "meta" and n == "content" and "src" in v)
    style = next(text for tag, text in seen.raw if tag == "style")
    script = [text for tag, text in seen.raw if tag == "script"][-1]
    for name, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "connect-src 'none'" in policy
    assert "connect-src 'self'" in render(hostile_run(), version=0)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # the name of a language, not a place


def chart(page: Page, title: str) -> Chart:
    blocks = [block for section in page.sections for block in section.blocks]
    return next(block for block in blocks if isinstance(block, Chart) and block.title == title)


def test_numbers_of_a_run() -> None:
    privacy = [
        {"privacy": {"epsilon": 0.5 * number}, "cut": {HOSTILE: 0.1 * number, "b": 0.5}}
        for number in (1, 2, 3)
    ]
    records = [{"round": 0, "seconds": 0.0, "eval": {"loss": 9.0, "accuracy": 0.2}}]
    records += [record(number, **privacy[number - 1]) for number in (1, 2, 3)]
    page = run_page(RunFacts("a", Config(), records))

    line = chart(page, "Accuracy against megabytes moved, both ways").series[0]
    assert list(line.x) == [0.0, 2.0, 4.0, 6.0]
    assert list(line.y) == [0.2, 0.5, 0.75, pytest.approx(1 - 0.5 / 3)]
    assert list(chart(page, "Accuracy against seconds in rounds").series[0].x) == [0, 3, 6, 9]
    training = chart(page, "Loss").series[0]
    assert list(training.low or []) == [2.0, 1.0, pytest.approx(2 / 3)]
    assert list(training.high or []) == [4.0, 2.0, pytest.approx(4 / 3)]
    spent = chart(page, "privacy epsilon").series[0]  # a measure that this page has never heard of
    assert list(zip(spent.x, spent.y, strict=True)) == [(1, 0.5), (2, 1.0), (3, 1.5)]
    clients = next(section for section in page.sections if section.title == "Clients").blocks[0]
    assert isinstance(clients, Table)
    column = list(clients.header).index("cut, mean")
    assert [row[column] for row in clients.rows] == ["0.2", "0.5"]
    cut = chart(page, "cut").series[0]
    assert [list(some or []) for some in (cut.low, cut.y, cut.high)] == [
        [pytest.approx(0.1 * number) for number in (1, 2, 3)],
        [pytest.approx((0.1 * number + 0.5) / 2) for number in (1, 2, 3)],
        [0.5, 0.5, 0.5],
    ]
    fairness = next(section for section in page.sections if section.title == "Fairness").blocks[0]
    assert isinstance(fairness, Table)
    assert [row[1] for row in fairness.rows] == ["0.500", "1.500", "1.000", "1.000", "0.500"]
    assert "the accuracy on held-out records is 0.833; the base model had 0.200" in page.headline


def test_privacy_that_was_spent() -> None:
    for epsilon, shown in ((2.9, "ε 2.9"), (None, "ε unbounded")):
        clients = {"a": {"num_examples": 3}}  # per record, no client tells its loss
        records = [record(1, epsilon=epsilon, delta=1e-5, loss=None, clients=clients)]
        figures = run_page(RunFacts("a", Config(), records)).figures
        assert next(item.value for item in figures if item.label == "privacy spent") == shown


def test_records_of_a_run_that_has_only_begun() -> None:
    for records in ([], [{"round": 0, "seconds": 0.0}], [record(1, eval=None, clients={})]):
        assert "rounds are done" in render(run_page(RunFacts("a", Config(), records, "running")))


def test_numbers_of_charts_survive_what_json_cannot_hold() -> None:
    series = Series("a", [1, 2, 3], [float("nan"), float("inf"), 0.123456789])
    page = Page("t", "s", "h", sections=[Section("x", [Chart("c", [series])])])
    data = json.loads(next(text for tag, text in Seen(render(page)).raw if tag == "script"))
    assert data["x-0"]["series"][0]["y"] == [None, None, 0.123457]


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_both_themes() -> None:
    """WCAG 2.2: 4.5 for text (1.4.3), 3 for what must be seen of a figure (1.4.11)."""
    style = (Path(rendering.__file__).parents[2] / "assets/report/report.css").read_text()
    themes = re.findall(r":root\s*{([^}]*)}", style)
    assert len(themes) == 3  # light, dark, print
    for theme in themes:
        colors = dict(re.findall(r"--(\w+):\s*(#\w+)", theme))
        colors = {
            k: v if len(v) == 7 else "#" + "".join(2 * c for c in v[1:]) for k, v in colors.items()
        }
        for name in ("text", "dim", "accent"):
            for ground in ("bg", "panel"):
                if name in colors:
                    assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)
        for i in range(10):
            assert contrast(colors[f"c{i}"], colors["bg"]) >= 3, i


def test_clients_whose_updates_are_cut_are_named() -> None:
    records = [record(number, cut={"b": 0.9}) for number in (1, 2, 3)]
    shown = render(run_page(RunFacts("a", Config(), records)))
    assert "b: its updates were cut or refused in 3 of 3 rounds" in shown
