"""The live page: who may read it, and what it says of a run that goes on."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.commands.watch.app import LivePage, make_app
from fedllm_flwr.commands.watch.state import Seen, look, signature
from fedllm_flwr.config.compose import compose
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.reporting.html.page import Page, Section, Table
from fedllm_flwr.reporting.metrics import MetricsLog
from fedllm_flwr.runs.directory import RunDirectory, create
from fedllm_flwr.runs.lock import RoundBoard, held

TOKEN, PORT = "t0ken", 8123
PAGE = Page("title", "subtitle", "headline")


def asked(
    path: str, method: str = "GET", host: str = f"127.0.0.1:{PORT}"
) -> tuple[int, dict[str, str]]:
    """Status and headers of the application's answer, over ASGI."""
    pytest.importorskip("starlette")
    live = LivePage(lambda: Seen(PAGE, True), lambda: 0, Seen(PAGE, True))
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(b"host", host.encode())],
        "http_version": "1.1",
        "scheme": "http",
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)  # the reader stays
        raise AssertionError("answered long ago")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(make_app(live, TOKEN, PORT)(scope, receive, send))
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}


def test_only_who_has_the_token_reads_and_nobody_writes() -> None:
    status, headers = asked(f"/{TOKEN}/")
    assert status == 200
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["content-security-policy"] == "frame-ancestors 'none'"
    status, headers = asked(f"/{TOKEN}/events?version=0")
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    for path in ("/", "/other/", "/other/events", f"/{TOKEN}/../", f"/{TOKEN}x/"):
        assert asked(path)[0] in (404, 307), path
    assert asked(f"/{TOKEN}/", method="POST")[0] == 405
    assert asked(f"/{TOKEN}/", host=f"evil.example:{PORT}")[0] == 404  # DNS rebinding
    assert asked(f"/{TOKEN}/", host="127.0.0.1:1")[0] == 404


def test_readers_hear_of_each_change_and_of_the_end() -> None:
    pages: Iterator[Seen] = iter(
        [
            Seen(replace(PAGE, headline="one"), False),
            Seen(replace(PAGE, headline="two"), True),
        ]
    )
    states = iter(range(100))
    live = LivePage(lambda: next(pages), lambda: next(states), Seen(PAGE, False))

    async def told() -> list[dict[str, Any]]:
        following = asyncio.create_task(live.follow(0.01))
        found = [json.loads(e.split("data: ", 1)[1]) async for e in live.events(0)]
        await following
        return found

    events = asyncio.run(asyncio.wait_for(told(), 10))
    assert events[-1]["ended"] is True
    assert "two" in events[-1]["body"]
    assert len(events) in (1, 2)  # a slow reader gets the newest alone


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    config = compose(["federation.num_rounds=10"])
    return create(replace(config, output_dir=str(tmp_path / "run")))


def table(page: Page, title: str) -> list[list[str]]:
    [block] = next(section for section in page.sections if section.title == title).blocks
    assert isinstance(block, Table)
    return [list(map(str, row)) for row in block.rows]


def test_a_run_that_goes_on_stops_and_goes_on_again(directory: RunDirectory) -> None:
    log = MetricsLog(directory.metrics)
    before = signature(directory.path)
    with contextlib.suppress(RuntimeError), held(directory):
        log.append({"round": 0, "seconds": 0.0})
        log.append({"round": 1, "seconds": 4.0, "loss": 2.0, "clients": {"a": {"loss": 2.0}}})
        board = RoundBoard(directory)
        board.start_round(2, ["a", "b", "c"])
        board.reply(2, "a", 1.5)
        board.reply(2, "b", None)
        seen = look(directory.path)
        assert not seen.has_ended
        assert "About 36 s remaining." in seen.page.headline
        rows = table(seen.page, "This round")
        assert rows == [["a", "replied", "1.500"], ["b", "failed", "-"], ["c", "asked", "-"]]
        alive = signature(directory.path)
        assert alive != before
        raise RuntimeError("the disk is gone")
    seen = look(directory.path)
    assert "The run has failed: the disk is gone." in seen.page.headline
    assert not seen.has_ended  # it may go on
    assert signature(directory.path) != alive
    with held(directory):
        assert "36 s" in look(directory.path).page.headline


def test_what_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a run \(config\.yaml\), a comparison"):
        look(tmp_path)


def test_a_comparison_before_its_first_run_has_finished(tmp_path: Path) -> None:
    about = {"options": {"algorithm": "fedavg"}, "overrides": [], "runs": ["fedavg-seed0"]}
    (tmp_path / "compare.json").write_text(json.dumps(about))
    seen = look(tmp_path)
    assert table(seen.page, "Progress") == [["fedavg-seed0", "waiting", "-", "-"]]
    assert Section("Progress", []).title in {section.title for section in seen.page.sections}
    assert not seen.has_ended
