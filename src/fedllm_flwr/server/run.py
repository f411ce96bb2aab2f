"""Executes one run, from a configuration to its final table, on simulated clients or a grid."""

import time

from flwr.serverapp import Grid

from fedllm_flwr.config import Config
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.fit import check_fit
from fedllm_flwr.server.opening import finished_before, open_run, with_absolute_paths
from fedllm_flwr.simulation import simulated_clients
from fedllm_flwr.simulation.grid import SimulationGrid
from fedllm_flwr.simulation.resources import check_machine

_NODES_S = 10.0  # seconds for Flower's simulation to start its nodes


def run_simulation(config: Config, console: Console, started: float) -> RunDirectory:
    """Run a configuration on the engine ``federation.engine``.

    Args:
        started: time.monotonic() at the start of the program, for the start-up time.

    Raises:
        FedLLMError: with one line for the user.
        KeyboardInterrupt: the user stopped it; the last checkpoint is kept.
    """
    config = with_absolute_paths(config)
    if (finished := finished_before(config, console)) is not None:
        return finished
    if config.federation.engine == "deployment":
        raise ConfigError(
            "federation.engine=deployment runs on a SuperLink: flwr run . <connection> --stream "
            "--run-config 'overrides=\"federation.engine=deployment ...\"'."
        )
    find_rule(config.algorithm)  # checks its options before any data is read
    console.status("reading the data")
    check_machine(config)
    data = check_fit(config)
    assert data is not None
    with open_run(config, console, started) as (directory, timings):
        with timings.phase("start-up"):
            from fedllm_flwr.server.serve import serve
        with simulated_clients(config, data.partition.num_clients, directory.client_states) as grid:
            serve(grid, config, directory, console, timings)
    return directory


def run_on_grid(
    config: Config, grid: Grid, console: Console, run_id: int, command: str = "flwr run . --stream"
) -> RunDirectory:
    """Run a configuration with the clients behind `grid`, which Flower has started as `run_id`.

    Args:
        command: command that has started the run, for use in messages.

    Raises:
        FedLLMError: with one line for the user.
    """
    config = with_absolute_paths(config)
    if (finished := finished_before(config, console)) is not None:
        return finished
    data = check_fit(config)
    if data is not None:
        wanted, deadline = data.partition.num_clients, time.monotonic() + _NODES_S
        while (nodes := len(list(grid.get_node_ids()))) < wanted and time.monotonic() < deadline:
            time.sleep(0.2)
        if nodes != wanted:
            raise ConfigError(
                f"the data make {wanted} clients, but Flower's simulation has {nodes} nodes; run: "
                f"{command} --federation-config 'num-supernodes={wanted}'"
            )
    with open_run(config, console, time.monotonic(), str(run_id)) as (directory, timings):
        with timings.phase("start-up"):
            from fedllm_flwr.server.serve import serve
        if data is not None:
            grid = SimulationGrid(grid, data.partition.num_clients, directory.client_states)
        serve(grid, config, directory, console, timings)
    return directory
