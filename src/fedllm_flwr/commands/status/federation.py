"""How a server or a site stands: its processes, its sites and its newest run."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from fedllm_flwr.commands.status.health import Health, addresses, check_health
from fedllm_flwr.commands.status.run import RunStatus, run_status
from fedllm_flwr.deployment.flower import ask_flower, is_server
from fedllm_flwr.deployment.registration import registered_sites
from fedllm_flwr.deployment.server import SITE_KEYS
from fedllm_flwr.deployment.site_views import site_requests
from fedllm_flwr.errors import FederationError
from fedllm_flwr.reporting.text import format_seconds, one_line

_SHOWN_RUNS = 3


@dataclass(frozen=True)
class FederationStatus:
    """A server's or site's directory as it stands; a site knows nothing of nodes and runs."""

    path: str
    health: list[Health]
    registered: list[str] = field(default_factory=list)  # names of the sites' keys
    online: list[str] = field(default_factory=list)  # names, or node ids of what has no key here
    offline: list[str] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)  # id, status, seconds; newest first
    problem: str = ""  # why Flower's own lists could not be had
    newest: RunStatus | None = None  # in outputs/
    waiting: list[str] = field(default_factory=list)  # a site's undecided requests

    @property
    def is_well(self) -> bool:
        """Whether all processes serve, and the newest run goes on or has finished."""
        runs_well = self.newest is None or self.newest.is_well
        return not self.problem and not any(part.problem for part in self.health) and runs_well

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.path}", *(part.line for part in self.health)]
        if self.problem:
            lines.append(f"  {self.problem}")
        elif self.registered or self.online or self.offline:
            lines.append(f"  sites       {_counted('online', self.online)}")
            lines.append(f"              {_counted('offline', self.offline)}")
            unknown = sorted({*self.registered} - {*self.online, *self.offline})
            if unknown:
                lines.append(f"              {_counted('not known to the SuperLink', unknown)}")
        if self.waiting:
            lines.append(
                f"  approval    {len(self.waiting)} waiting ({', '.join(self.waiting)}): "
                f"fedllm site requests {self.path}"
            )
        lines += [
            f"  run         {run['id']}: {run['status']} ({format_seconds(run['seconds'])})"
            for run in self.runs[:_SHOWN_RUNS]
        ]
        return lines + (self.newest.lines() if self.newest else [])


def is_operators(folder: Path) -> bool:
    """Whether `fedllm server init` or `fedllm site init` has made this directory."""
    return is_server(folder) or (folder / "node.toml").is_file()


def federation_status(folder: Path) -> FederationStatus:
    """Ask the processes of a server's or site's directory, each for a few seconds at most."""
    health = [check_health(part, address) for part, address in addresses(folder).items()]
    if not is_server(folder):
        waiting = [request.id for request in site_requests(folder).all() if request.is_waiting]
        return FederationStatus(str(folder), health, waiting=waiting)
    registered = sorted(file.stem for file in (folder / SITE_KEYS).glob("*.pub"))
    newest = _newest_run(folder / "outputs")
    down = [part.part for part in health if part.part == "superlink" and part.problem]
    if down:
        return FederationStatus(str(folder), health, registered, newest=newest)
    try:
        nodes = _listed(folder, "nodes", "supernode", "list")
        runs = _listed(folder, "runs", "list")
    except FederationError as error:
        return FederationStatus(str(folder), health, registered, problem=str(error), newest=newest)
    return FederationStatus(
        path=str(folder),
        health=health,
        registered=registered,
        online=_names(folder, [node for node in nodes if node["status"] == "online"]),
        offline=_names(folder, [node for node in nodes if node["status"] != "online"]),
        runs=[
            {"id": run["run-id"], "status": run["status"], "seconds": float(run["elapsed"])}
            for run in runs
        ],
        newest=newest,
    )


def _names(folder: Path, nodes: list[dict[str, Any]]) -> list[str]:
    """Names of nodes in order; a node without a registered key is called by its id."""
    sites = registered_sites(folder)
    ids = [int(node["node-id"]) for node in nodes]
    return sorted(sites.get(node_id, f"node {node_id}") for node_id in ids)


def _counted(state: str, names: list[str]) -> str:
    listed = one_line(", ".join(names))
    return f"{len(names)} {state}: {listed}" if names else f"0 {state}"


def _listed(folder: Path, what: str, *command: str) -> list[dict[str, Any]]:
    answer, said = ask_flower(folder, *command)
    if what not in answer:
        reason = one_line(str(answer.get("error-message") or said)) or "no answer"
        raise FederationError(f"flwr {' '.join(command)}: {reason}")
    return cast(list[dict[str, Any]], answer[what])


def _newest_run(outputs: Path) -> RunStatus | None:
    runs = sorted(outputs.glob("*/config.yaml"), key=lambda file: file.stat().st_mtime)
    return run_status(runs[-1].parent) if runs else None
