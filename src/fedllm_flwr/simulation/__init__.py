"""Simulation engines: start clients and provide the grid that reaches them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from flwr.serverapp import Grid

from fedllm_flwr.config import Config


@contextlib.contextmanager
def simulated_clients(config: Config, num_clients: int, state_dir: Path) -> Iterator[Grid]:
    """Start the clients of a run on the engine ``federation.engine``.

    Args:
        state_dir: directory of the clients' memory of the run.

    Yields:
        The Flower grid of the clients, which end with the context.

    Raises:
        FederationError: the engine cannot start, or has failed.
        ConfigError: a client needs more than the cluster of ``federation.ray_address`` has.
    """
    if config.federation.engine == "inprocess":
        from fedllm_flwr.client.app import app
        from fedllm_flwr.client.processes import processes
        from fedllm_flwr.simulation.grid import MOST_NODES, SimulationGrid
        from fedllm_flwr.simulation.inprocess import InProcessGrid

        nodes = InProcessGrid(app, min(num_clients, MOST_NODES))
        try:
            yield SimulationGrid(nodes, num_clients, state_dir)
        finally:
            processes.end()
        return
    from fedllm_flwr.simulation.ray import ray_clients

    with ray_clients(config, num_clients, state_dir) as grid:
        yield grid
