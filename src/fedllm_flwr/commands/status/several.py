"""State of a comparison or a sweep, read from its directory."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedllm_flwr.commands.status.run import RunStatus, run_status
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.reporting.text import fixed
from fedllm_flwr.tasks import all_metrics

# Marker file -> the kind of directory, the folder of its runs, and the command that resumes it.
_KINDS = {
    "compare.json": ("comparison", "runs", "fedllm compare resume="),
    "sweep.json": ("sweep", ".", "fedllm run --multirun resume="),
}


@dataclass(frozen=True)
class SeveralStatus:
    """State of a comparison or a sweep; ``runs`` has None for runs that have not started."""

    path: str
    kind: str  # comparison | sweep
    runs: dict[str, RunStatus | None]  # by directory name

    @property
    def state(self) -> str:
        """running if any run is, finished if all are, otherwise failed or stopped."""
        states = {run.state if run else "waiting" for run in self.runs.values()}
        if "running" in states:
            return "running"
        if states == {"finished"}:
            return "finished"
        return "failed" if "failed" in states else "stopped"

    @property
    def is_well(self) -> bool:
        """Whether a run is running or all have finished."""
        return self.state in ("running", "finished")

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "state": self.state}

    def lines(self) -> list[str]:
        """The state as lines of text, one for each run."""
        counts = Counter(run.state if run else "waiting" for run in self.runs.values())
        done = f"{counts.pop('finished', 0)} of {len(self.runs)} runs finished"
        rest = [f"{count} {state}" for state, count in sorted(counts.items())]
        width = max(map(len, self.runs), default=0)
        lines = [f"{self.path}: {self.kind}, {', '.join([done, *rest])}"]
        lines += [f"  {name:<{width}}  {_line(run)}" for name, run in self.runs.items()]
        if not self.is_well:
            command = next(how for kind, _, how in _KINDS.values() if kind == self.kind)
            lines.append(f"  resume with: {command}{self.path}")
        return lines


def holds_several(folder: Path) -> bool:
    """Whether the directory belongs to a comparison or a sweep."""
    return any((folder / file).is_file() for file in _KINDS)


def several_status(folder: Path) -> SeveralStatus:
    """Read the directory of a comparison or sweep.

    Raises:
        ConfigError: its list of runs cannot be read.
    """
    file = next(name for name in _KINDS if (folder / name).is_file())
    kind, below, _ = _KINDS[file]
    try:
        names = list(json.loads((folder / file).read_text("utf-8")).get("runs", []))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder / file}: cannot be read ({error}).") from error
    place = folder / below
    begun = sorted(path.parent.name for path in place.glob("*/config.yaml"))
    names += [name for name in begun if name not in names]
    runs = {name: run_status(place / name) if name in begun else None for name in names}
    return SeveralStatus(str(folder), kind, runs)


def _line(run: RunStatus | None) -> str:
    if run is None:
        return "waiting"
    scores = (run.last or {}).get("eval") or {}
    names = [name for name, shown in all_metrics().items() if shown.round_width and name in scores]
    shown = [f"{name} {fixed(scores[name], 3)}" for name in names]
    if run.state != "finished":
        shown.insert(0, f"round {run.round} of {run.num_rounds}")
    return "   ".join([f"{run.state:<8}", *shown])
