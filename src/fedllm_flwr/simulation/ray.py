"""Flower's simulation engine on Ray: clients in worker processes that keep their model loaded."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedllm_flwr.config import Config
from fedllm_flwr.errors import FederationError
from fedllm_flwr.simulation import ServerMain
from fedllm_flwr.simulation.access import private_ray
from fedllm_flwr.simulation.resources import join_cluster, start_ray
from fedllm_flwr.simulation.stoppable import StoppableGrid


def run_ray(config: Config, num_clients: int, main: ServerMain) -> None:
    """Run `main` in a thread while this one feeds the clients' messages to Ray workers.

    Flower's `run_simulation` runs server and engine in this process, so that nothing is left
    behind and errors come back as they are.

    Raises:
        FederationError: Ray cannot start, or no cluster is at ``federation.ray_address``.
        ConfigError: a client takes more than any machine of that cluster has.
        KeyboardInterrupt: the user stopped the run.
    """
    with contextlib.ExitStack() as stack:
        init_args: dict[str, Any] = {"logging_level": "critical", "log_to_driver": False}
        if address := config.federation.ray_address:
            init_args["address"] = address
            join_cluster(address, init_args, config.federation)
        else:
            # Without an address Ray joins any cluster that runs on this machine.
            folder = stack.enter_context(private_ray())
            init_args |= {"address": "local", "_temp_dir": str(folder)}
        _serve(config, num_clients, main, init_args)


def _serve(
    config: Config, num_clients: int, main: ServerMain, init_args: Mapping[str, Any]
) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        try:
            main(StoppableGrid(grid, stop))
        except BaseException as error:
            failures.append(error)
            raise

    with _interrupts(stop) as listen, _flower_silent():
        try:
            _simulate(server_app, config, num_clients, init_args, listen)
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
                raise KeyboardInterrupt from error  # Ray's own answer, until `listen`
            if not failures:
                raise _engine_failed(error) from error
    if failures:
        raise failures[0]


def _simulate(
    server_app: ServerApp,
    config: Config,
    num_clients: int,
    init_args: Mapping[str, Any],
    listen: Callable[[], None],
) -> None:
    from flwr.simulation import run_simulation

    from fedllm_flwr.client.app import app as client_app

    if not config.federation.ray_address:
        start_ray(init_args)
    listen()  # Ray has taken SIGTERM to itself
    backend: Any = {
        "init_args": init_args,
        "client_resources": {
            "num_cpus": config.federation.client_cpus,
            "num_gpus": config.federation.client_gpus,
        },
    }
    run_simulation(server_app, client_app, num_clients, backend_config=backend)


def _engine_failed(error: BaseException) -> FederationError:
    return FederationError(
        f"the Ray engine failed ({_first_line(error)}); run `fedllm doctor`, or use "
        "federation.engine=inprocess."
    )


@contextlib.contextmanager
def _interrupts(stop: threading.Event) -> Iterator[Callable[[], None]]:
    """Let the first Ctrl-C end the server at its next look at the grid, the second all at once.

    What it yields sets this up once more, after others have set up something else.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in signals}

    def listen() -> None:
        for number in signals:
            signal.signal(number, handle)

    try:
        yield listen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _flower_silent() -> Iterator[None]:
    """Keep Flower's log away: it repeats as stack traces what the run reports itself."""
    logger = logging.getLogger("flwr")
    before = logger.disabled
    logger.disabled = True
    hook = threading.excepthook
    threading.excepthook = lambda _: None
    try:
        yield
    finally:
        logger.disabled = before
        threading.excepthook = hook


def _first_line(error: BaseException) -> str:
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0] if text else type(error).__name__
