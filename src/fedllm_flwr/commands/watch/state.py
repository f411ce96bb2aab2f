"""The live page of a directory: a run, a comparison, or a server's newest run."""

import contextlib
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedllm_flwr.commands.compare.command import SAVED, report_page
from fedllm_flwr.commands.status.federation import FederationStatus, federation_status
from fedllm_flwr.commands.status.run import RunStatus, run_status
from fedllm_flwr.commands.status.several import several_status
from fedllm_flwr.deployment.flower import is_server
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.reporting.html.page import Page, Section, Table
from fedllm_flwr.reporting.html.run import run_page
from fedllm_flwr.reporting.text import fixed, format_seconds
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.lock import holder
from fedllm_flwr.runs.report import run_facts

_SITES_S = 10.0  # between two requests to a server for its sites
_FILES = ("metrics.jsonl", "round.json", "run.lock", "summary.json", "config.yaml", "clients.csv")


@dataclass(frozen=True)
class Seen:
    """A page, and whether its run has ended."""

    page: Page
    has_ended: bool


def look(folder: Path) -> Seen:
    """The current page of a directory.

    Raises:
        ConfigError: it contains neither a run, nor a comparison, nor a server with a run.
        DataError: one of its files is damaged.
    """
    if (folder / SAVED).is_file():
        return _comparison(folder)
    if is_server(folder):
        status = federation_status(folder.resolve())
        if status.newest is None:
            return Seen(
                Page("No run yet", f"Server {folder}", "", sections=[_sites(status)]), False
            )
        run = _run(RunDirectory(Path(status.newest.path)), status.newest)
        page = replace(run.page, sections=[_sites(status), *run.page.sections])
        return Seen(page, has_ended=False)  # the server waits for its next run
    if (folder / "config.yaml").is_file():
        return _run(RunDirectory(folder), run_status(folder))
    raise ConfigError(
        f"{folder}: neither a run (config.yaml), a comparison ({SAVED}), nor a directory of fedllm "
        "server init; give one of these."
    )


def signature(folder: Path) -> tuple[Hashable, ...]:
    """A value that changes whenever the page would: file times and live processes.

    A server's sites connect without changing a file, so for a server it changes every few seconds.
    """
    found: list[Hashable] = [int(time.time() / _SITES_S)] if is_server(folder) else []
    for place in (folder, *sorted(folder.glob("runs/*")), *sorted(folder.glob("outputs/*"))):
        for name in _FILES:
            with contextlib.suppress(OSError):
                stat = (place / name).stat()
                found.append((place / name, stat.st_size, stat.st_mtime_ns))
        if (place / "run.lock").exists():
            who = holder(RunDirectory(place))
            found.append(who is not None and who.is_alive)
    return tuple(found)


def _run(directory: RunDirectory, status: RunStatus) -> Seen:
    facts = run_facts(directory)
    page = run_page(replace(facts, state=status.state, now=_now(status)))
    if status.state != "finished" and status.current is not None:
        page = replace(page, sections=[_this_round(status), *page.sections])
    return Seen(page, status.state == "finished")


def _now(status: RunStatus) -> str:
    """A sentence on the run's state and the remaining time."""
    if status.state == "finished":
        return ""
    if status.state != "running":
        why = f": {status.error}" if status.error else ""
        return f"The run has {status.state}{why}. This page continues when the run is resumed."
    left = status.num_rounds - status.round
    if status.seconds_per_round is None or not left:
        return "The run is in progress."
    return f"About {format_seconds(left * status.seconds_per_round)} remaining."


def _this_round(status: RunStatus) -> Section:
    current = status.current
    assert current is not None
    rows = [
        [
            name,
            "replied"
            if name in current.losses
            else "failed"
            if name in current.failed
            else "asked",
            fixed(current.losses.get(name), 3),
        ]
        for name in current.asked
    ]
    table = Table(["client", "state", "loss"], rows, f"Round {current.round}")
    return Section("This round", [table])


def _sites(status: FederationStatus) -> Section:
    by_state = (("online", status.online), ("offline", status.offline))
    rows = [[name, state] for state, names in by_state for name in names]
    rows += [[part.part, part.problem or "serves"] for part in status.health]
    return Section("Sites and processes", [Table(["", "state"], rows, note=status.problem)])


def _comparison(folder: Path) -> Seen:
    status = several_status(folder)
    rows: list[Sequence[str]] = []
    for name, run in status.runs.items():
        rounds = f"{run.round} of {run.num_rounds}" if run else "-"
        loss = (run.last or {}).get("loss") if run else None
        rows.append([name, run.state if run else "waiting", rounds, fixed(loss, 3)])
    runs = Section("Progress", [Table(["run", "state", "rounds", "training loss"], rows)])
    done = sum(run is not None and run.state == "finished" for run in status.runs.values())
    headline = f"{done} of {len(status.runs)} runs have finished."
    try:
        page = report_page(folder)
    except ConfigError:  # no run has finished
        page = Page("Algorithms", f"Comparison {folder.resolve().name}", "")
    text = f"{headline} {page.headline}".strip()
    page = replace(page, headline=text, sections=[runs, *page.sections])
    return Seen(page, status.state == "finished")
