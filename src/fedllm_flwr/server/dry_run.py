"""``fedllm server run --dry-run``: shows the participants and the plan of a run."""

import time
from pathlib import Path

from flwr.serverapp import Grid

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.deployment.site_keys import registered_keys, registered_sites
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.census import Census
from fedllm_flwr.federation.messages import ClientInfo
from fedllm_flwr.federation.roster import Client, unlike_models
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.server.planning import make_plan
from fedllm_flwr.server.preparation import prepare

_PAUSE_S = 0.5


def rehearse(config: Config, grid: Grid, console: Console) -> None:
    """Ask the sites and show the plan; nothing is trained or written.

    A site that waits for its operator's approval is counted as able to take part.

    Raises:
        FedLLMError: the run could not start, because a site refuses or too few are connected.
    """
    console.status("loading data and model")
    prepared = prepare(config)
    console.status("asking the sites")
    wanted, federation = prepared.num_clients, config.federation
    here = Path.cwd()
    census = Census(grid, config, registered=registered_sites(here), keys=registered_keys(here))
    deadline = time.monotonic() + federation.start_timeout_s
    while time.monotonic() < deadline:
        census.look()
        heard = len(census.clients) + len(census.refused) + len(census.waiting)
        if heard >= wanted and not census.silent:
            break
        time.sleep(_PAUSE_S)
    roster = dict(sorted(census.clients.items()))
    planned = roster | {
        node.label: Client(node_id, ClientInfo(node.label, 0, __version__))
        for node_id, node in census.waiting.items()
    }
    if planned:
        nowhere = RunDirectory(Path("nothing, this is a dry run"))
        warnings = [*prepared.warnings, *unlike_models(roster)]
        console.plan(make_plan(config, prepared, planned, nowhere, 1, warnings))
    said = {
        name: f"{client.info.num_examples:,} examples, would take part"
        for name, client in census.clients.items()
    }
    said |= {node.label: node.why for node in census.waiting.values()}
    said |= {name: f"refuses: {why}" for name, why in census.refused.items()}
    said |= dict.fromkeys(census.silent, "connected, no answer")
    said |= dict.fromkeys(census.missing, "registered, not connected")
    for name, what in sorted(said.items()):
        console.note(f"  {name}: {what}")
    away = [*census.missing, *census.silent]
    required = min(federation.min_clients or wanted, wanted)
    there = len(roster) + len(census.waiting)
    if census.refused:
        names = ", ".join(sorted(census.refused))
        raise FederationError(f"dry run: {names} would not take part; the lines above say why")
    if there < required:
        missing = f" (not connected or silent: {', '.join(away)})" if away else ""
        raise FederationError(f"dry run: {there} of {wanted} sites are there{missing}")
    console.note("dry run: the run could start; nothing was trained.")
