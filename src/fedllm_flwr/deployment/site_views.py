"""The operator's view of a site: pending requests, and the audit log."""

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from fedllm_flwr.deployment.approval import (
    APPROVED,
    DECLINED,
    Requests,
    differences,
    in_words,
)
from fedllm_flwr.deployment.audit import AuditLog, Entry
from fedllm_flwr.deployment.node import site_folder
from fedllm_flwr.errors import FederationError
from fedllm_flwr.reporting.text import format_bytes, shorten

_SHOWN_DIFFERENCES = 12
_LONGEST_LINE = 500  # characters


def site_requests(folder: Path) -> Requests:
    """The requests that are kept in a site's directory."""
    return Requests(folder / "requests")


def requests_lines(directory: str | Path, every: bool, full: bool, as_json: bool) -> list[str]:
    """The pending requests as text; with `every`, also those that are decided or abandoned.

    Args:
        full: show all settings of each request.
    """
    folder = site_folder(directory)
    known = site_requests(folder).all()
    chosen = [request for request in known if every or request.is_waiting]
    if as_json:
        return [json.dumps([asdict(request) for request in chosen])]
    lines: list[str] = []
    for request in chosen:
        if request.is_waiting:
            state = f"waiting since {local_time(request.asked)}"
        elif request.is_undecided:
            state = f"no longer asked since {local_time(request.last_asked)}: ended, or a dry run"
        else:
            state = f"{request.decision} {local_time(request.decided)} by {request.by}"
        server = request.server or "the server"
        said = [f"{request.id}  run {request.run} from {server}   {state}"]
        said += [f"  {line}" for line in in_words(request.settings)]
        approved = [r for r in known if r.decision == APPROVED and r.id != request.id]
        if approved:  # show the differences from the last approved request
            last = approved[-1]
            about = f"{last.id}, approved {local_time(last.decided)}"
            changed = differences(request.settings, last.settings)
            said.append(f"  other than {about}:" if changed else f"  the same settings as {about}")
            said += [f"    {line}" for line in changed[:_SHOWN_DIFFERENCES]]
            if (more := len(changed) - _SHOWN_DIFFERENCES) > 0:
                said.append(f"    and {more} more (--full)")
        if full:
            said += [f"    {line}" for line in json.dumps(request.settings, indent=1).splitlines()]
        lines += map(printable, said)
        if request.is_waiting:
            lines.append(f"  approve: fedllm site approve {folder} {request.id}")
            lines.append(f"  decline: fedllm site decline {folder} {request.id}")
    waiting = sum(request.is_waiting for request in known)
    if not chosen:
        lines.append("No request waits." + (" --all shows those decided." if known else ""))
    elif waiting and waiting < len(known):
        lines.append(f"{waiting} of {len(known)} requests wait.")
    return lines


def decide_request(directory: str | Path, name: str, approve: bool) -> list[str]:
    """Approve or decline a request; the decision is written to the audit log.

    Raises:
        ConfigError: no request, or several, match.
        FederationError: the decision cannot be written.
    """
    folder = site_folder(directory)
    requests = site_requests(folder)
    decision = APPROVED if approve else DECLINED
    request = requests.decide(name, decision)
    AuditLog(folder / "audit").append(
        {
            "event": "decision",
            "run": request.run,
            "server": request.server,
            "settings_digest": request.digest,
            "request": request.id,
            "by": request.by,
            "verdict": decision,
        },
        request.settings,
    )
    word = "Approved" if approve else "Declined"
    return [printable(f"{word} run {request.run}: {in_words(request.settings)[0]}.")]


def print_log(directory: str | Path, run: str | None, as_json: bool) -> None:
    """Print the audit log, and check its chain.

    Args:
        run: Flower's id, or its first digits, of the run to show; None: all runs.

    Raises:
        FederationError: the chain is broken; names the line.
    """
    report = AuditLog(site_folder(directory) / "audit").read()
    for entry in report.entries:
        if run is None or str(entry.get("run", "")).startswith(run):
            print(json.dumps(entry) if as_json else entry_line(entry, with_run=run is None))
    if report.removed and not as_json:
        print(f"Entries 1 to {report.removed} have been moved away.")
    if report.problems:
        more = len(report.problems) - 1
        also = f" (and {more} more)" if more else ""
        raise FederationError(f"the audit log is broken: {report.problems[0]}{also}")
    if not as_json:
        last = f", last hash {report.head}" if report.entries else ""
        print(f"{len(report.entries)} entries, chain unbroken{last}")


def entry_line(entry: Entry, with_run: bool) -> str:
    """A line such as ``09:41:07  round 1  160 records   left: 41,472 values (83 kB), ...``."""
    what = f"round {entry['round']}" if entry.get("round") else str(entry.get("event", ""))
    if entry.get("event") == "evaluate":
        what = f"score {entry.get('round', '')}"
    parts = [f"{local_time(entry['time'])}  {what:<9}"]
    if with_run:
        parts.append(f"run {entry.get('run', '')}")
    if entry.get("event") == "query" and "model" in entry:
        commit = f"@{entry['commit']}" if entry.get("commit") else ""
        parts.append(f"{entry['algorithm']}, {entry['task']}, {entry['model']}{commit}")
    if entry.get("records"):
        parts.append(f"{entry['records']} records")
    if entry.get("values"):
        norms = ", ".join(f"{name} {value:.3g}" for name, value in entry["norms"].items())
        parts.append(
            f"left: {entry['values']:,} values ({format_bytes(entry['bytes'])}), norm of {norms}"
        )
    parts.append(str(entry.get("verdict", "")))
    if entry.get("by"):
        parts.append(f"by {entry['by']}")
    if entry.get("reason"):
        parts.append(str(entry["reason"]))
    return printable("  ".join(parts))


def printable(line: str) -> str:
    """A line that may contain text from a server, truncated and safe for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in shorten(line, _LONGEST_LINE))


def local_time(text: str) -> str:
    """A time of the log in the local time zone; without the date if it is today."""
    moment = datetime.fromisoformat(text).astimezone()
    is_today = moment.date() == datetime.now().astimezone().date()
    return f"{moment:%H:%M:%S}" if is_today else f"{moment:%Y-%m-%d %H:%M:%S}"
