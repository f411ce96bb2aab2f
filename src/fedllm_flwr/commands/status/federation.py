"""State of a server or a site: its processes, its sites and its newest run."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from fedllm_flwr.commands.status.health import Health, addresses, check_health
from fedllm_flwr.commands.status.run import RunStatus, run_status
from fedllm_flwr.deployment.flower import ask_flower, is_server
from fedllm_flwr.deployment.site_keys import SITE_KEYS, registered_sites
from fedllm_flwr.deployment.site_views import site_requests
from fedllm_flwr.errors import FederationError
from fedllm_flwr.reporting.text import format_seconds, one_line

_SHOWN_RUNS = 3


@dataclass(frozen=True)
class FederationStatus:
    """State of a server or a site; only servers have the fields on nodes and runs."""

    path: str
    health: list[Health]
    registered: list[str] = field(default_factory=list)  # names of the sites' keys
    online: list[str] = field(default_factory=list)  # names, or node ids without a registered key
    offline: list[str] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)  # id, status, seconds; newest first
    problem: str = ""  # why Flower's lists are missing
    newest: RunStatus | None = None  # in outputs/
    waiting: list[str] = field(default_factory=list)  # a site's undecided requests

    @property
    def is_well(self) -> bool:
        """Whether all processes serve, and the newest run is running or has finished."""
        problems = [self.problem, *(part.problem for part in self.health)]
        return not any(problems) and (self.newest is None or self.newest.is_well)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The state as lines of text."""
        lines = [self.path, *(part.line for part in self.health)]
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
    """Whether a directory was made by ``fedllm server init`` or ``fedllm site init``."""
    return is_server(folder) or (folder / "node.toml").is_file()


def federation_status(folder: Path) -> FederationStatus:
    """State of a server's or a site's directory; queries its processes with a short timeout."""
    health = [check_health(part, address) for part, address in addresses(folder).items()]
    if not is_server(folder):
        waiting = [request.id for request in site_requests(folder).all() if request.is_waiting]
        return FederationStatus(str(folder), health, waiting=waiting)
    registered = sorted(file.stem for file in (folder / SITE_KEYS).glob("*.pub"))
    runs = sorted(folder.glob("outputs/*/config.yaml"), key=lambda file: file.stat().st_mtime)
    newest = run_status(runs[-1].parent) if runs else None
    if any(part.part == "superlink" and part.problem for part in health):
        return FederationStatus(str(folder), health, registered, newest=newest)
    try:
        nodes = _listed(folder, "nodes", "supernode", "list")
        listed = _listed(folder, "runs", "list")
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
            for run in listed
        ],
        newest=newest,
    )


def _names(folder: Path, nodes: list[dict[str, Any]]) -> list[str]:
    """Sorted names of nodes; a node without a registered key is shown by its id."""
    sites = registered_sites(folder)
    ids = [int(node["node-id"]) for node in nodes]
    return sorted(sites.get(node_id, f"node {node_id}") for node_id in ids)


def _counted(state: str, names: list[str]) -> str:
    listed = one_line(", ".join(names))
    return f"{len(names)} {state}: {listed}" if names else f"0 {state}"


def _listed(folder: Path, what: str, *command: str) -> list[dict[str, Any]]:
    answer, said = ask_flower(folder, *command)
    if what not in answer:
        reason = one_line(str(answer.get("error-message") or said)) or "no response"
        raise FederationError(f"flwr {' '.join(command)}: {reason}")
    return cast(list[dict[str, Any]], answer[what])
