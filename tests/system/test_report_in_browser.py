"""Reports in a real browser: charts are drawn, answer to keys and mouse, and obey their policy."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from browser import CHROMIUM, Browser
from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import compose
from fedllm_flwr.reporting.html.render import render
from fedllm_flwr.reporting.html.run import RunFacts, run_page
from fedllm_flwr.reporting.metrics import MetricsLog, read_metrics, summarise, write_summary
from fedllm_flwr.runs.directory import RunDirectory, create
from fedllm_flwr.runs.lock import RoundBoard, held

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine"),
]

# What a screen reader would not be able to say, and what it tells apart by names.
UNNAMED = (
    "[...document.querySelectorAll('button, th, summary, a')]"
    ".filter(e => !e.textContent.trim()).map(e => e.outerHTML)"
)
LANDMARKS = (
    "[...document.querySelectorAll('[role=region], nav, section')]"
    ".map(e => e.getAttribute('aria-label') || e.getAttribute('aria-labelledby'))"
)
EVIL = "</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as opened:
        yield opened


@pytest.fixture
def address(tmp_path: Path) -> str:
    """The report of a run whose clients have hostile names."""
    names = [EVIL, *(f"client-{i}" for i in range(11))]
    records = [
        {
            "round": number,
            "seconds": 1.0,
            "loss": 8.0 / number**2,
            "clients": {
                name: {"loss": (8.0 + (name == EVIL)) / number**2, "num_examples": 1}
                for name in names
            },
            "failures": {EVIL: EVIL},
            "eval": {"loss": 7.0 / number**2, "accuracy": 1 - 1 / (1 + number)},
        }
        for number in range(1, 9)
    ]
    file = tmp_path / "report.html"
    file.write_text(render(run_page(RunFacts("a", Config(), records))), encoding="utf-8")
    return file.as_uri()


PLOT = "document.querySelector('#curves figure .plot > div')"
READOUT = "document.querySelector('#curves figure .readout').textContent"
TICKS = (
    f"[...{PLOT}.querySelectorAll('text[text-anchor=middle]')].map(t => t.textContent).join(' ')"
)


def test_charts_by_keyboard_and_mouse(browser: Browser, address: str) -> None:
    browser.open(address)
    figures = browser.value("document.querySelectorAll('figure').length")
    assert browser.value("document.querySelectorAll('figure .plot svg .curve').length") >= figures
    assert browser.value(TICKS) == "2 4 6 8 round"

    browser.value(f"{PLOT}.focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.value(READOUT).startswith("round 2  ·  training, mean of clients 2 (2 to 2.25)")
    browser.press("+")
    zoomed = browser.value(TICKS)
    browser.press("Escape")
    assert browser.value(TICKS) != zoomed

    browser.value(f"{PLOT}.scrollIntoView()")
    box = browser.value(
        f"(r => [r.left, r.top, r.width, r.height])({PLOT}.getBoundingClientRect())"
    )
    left, top, width, height = box
    middle = top + height / 2
    browser.drag((left + 0.4 * width, middle), (left + 0.7 * width, middle))
    assert (
        browser.value("document.querySelector('#curves .tools button:last-of-type').hidden")
        is False
    )

    browser.value("document.querySelector('#curves .legend button').click()")
    assert browser.value(f"{PLOT}.querySelectorAll('.curve').length") == 1
    browser.value("document.querySelector('#clients thead button').click()")
    first = "document.querySelector('#clients tbody th').textContent"
    assert browser.value(first) == EVIL  # sorted by name
    assert browser.console == []


def test_hostile_names_run_nothing_and_fit_a_phone(browser: Browser, address: str) -> None:
    for width, dark in ((1200, False), (390, True)):
        browser.look_like(width, 844, dark)
        browser.open(address)
        assert browser.value("document.title") == "fedavg on demo"
        assert browser.value("document.querySelectorAll('img, iframe').length") == 0
        root = "document.documentElement"
        assert browser.value(f"{root}.scrollWidth <= {root}.clientWidth")
        assert browser.value("document.querySelector('thead td')") is not None  # an empty corner
        assert browser.value(UNNAMED) == []
        names = browser.value(LANDMARKS)
        assert len(names) == len(set(names))
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(20, 24, 29)"
    assert browser.console == []  # no violation of the policy, no error


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    config = compose(["federation.num_rounds=4"])
    return create(replace(config, output_dir=str(tmp_path / "run")))


def trained(number: int) -> dict[str, Any]:
    clients = {name: {"loss": 4.0 / number, "num_examples": 1} for name in (EVIL, "b")}
    scores = {"loss": 5.0 / number, "accuracy": 1 - 1 / (1 + number)}
    return {
        **{"round": number, "seconds": 1.0, "loss": 4.0 / number, "clients": clients},
        **{"eval": scores, "phases": {"training": 1.0}},
    }


ROUNDS = "document.querySelector('#head').textContent.match(/rounds(\\d) of 4/)[1]"
LIVE = "document.getElementById('live').textContent"


def test_the_live_page_grows_outlives_a_restart_and_ends(
    browser: Browser, directory: RunDirectory
) -> None:
    pytest.importorskip("uvicorn")
    log, board = MetricsLog(directory.metrics), RoundBoard(directory)
    log.append({"round": 0, "seconds": 0.0, "eval": {"loss": 9.0, "accuracy": 0.1}})
    command = [sys.executable, "-m", "fedllm_flwr.commands.main", "watch", str(directory.path)]
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(contextlib.ExitStack())
        lock.enter_context(held(directory))
        watching = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(watching.terminate)
        assert watching.stdout is not None
        url = watching.stdout.readline().split()[0]
        browser.open(url)
        assert browser.wait(f"{LIVE} == 'Live'")
        assert browser.value(ROUNDS) == "0"
        for number in (1, 2):
            board.start_round(number, [EVIL, "b"])
            board.reply(number, EVIL, 1.0)
            shown = f"document.querySelector('#this-round')?.textContent.includes('{number}')"
            assert browser.wait(shown)
            log.append(trained(number))
            assert browser.wait(f"{ROUNDS} == '{number}'")
        browser.value(f"{PLOT}.focus()")
        browser.press("+")
        zoomed = browser.value(TICKS)

        with contextlib.suppress(RuntimeError):  # the run's process dies, and another goes on
            lock.close()
        assert browser.wait("document.querySelector('.subtitle').textContent.includes('stopped')")
        lock.enter_context(held(directory))
        assert browser.wait("document.querySelector('.subtitle').textContent.includes('running')")
        for number in (3, 4):
            log.append(trained(number))
        assert browser.wait(f"{ROUNDS} == '4'")
        assert browser.value(TICKS) == zoomed
        assert browser.value("document.title") == "fedavg on demo"

        finish(directory)
        lock.close()
        assert browser.wait(f"{LIVE} == 'The run has ended.'")
        assert watching.wait(20) == 0
    assert browser.console == []


def finish(directory: RunDirectory) -> None:
    """What tells a finished run from one that has stopped."""
    directory.adapter.mkdir()
    write_summary(directory.summary, summarise(read_metrics(directory.metrics), {}))
    directory.checkpoints.mkdir()
    (directory.checkpoints / "round-00004.safetensors").touch()
