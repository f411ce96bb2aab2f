"""Engines: how the messages of a simulated run reach its clients."""

from collections.abc import Callable

from flwr.serverapp import Grid

from fedllm_flwr.config import Config
from fedllm_flwr.errors import ConfigError

ServerMain = Callable[[Grid], None]
Engine = Callable[[Config, int, ServerMain], None]


def find_engine(name: str) -> Engine:
    """The engine of ``federation.engine``; each imports what it needs only when chosen.

    Raises:
        ConfigError: a deployment, whose messages a SuperLink carries.
    """
    if name == "deployment":
        raise ConfigError(
            "federation.engine=deployment runs on a SuperLink: flwr run . <connection> --stream "
            "--run-config 'overrides=\"federation.engine=deployment ...\"'."
        )
    if name == "inprocess":
        from fedllm_flwr.simulation.inprocess import run_inprocess

        return run_inprocess
    from fedllm_flwr.simulation.ray import run_ray

    return run_ray
