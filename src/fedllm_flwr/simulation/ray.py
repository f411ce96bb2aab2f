"""Flower's simulation engine on Ray: clients in worker processes that keep their model loaded."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedllm_flwr.config import Config
from fedllm_flwr.errors import FederationError, first_line
from fedllm_flwr.simulation.access import private_ray
from fedllm_flwr.simulation.grid import MOST_NODES, SimulationGrid
from fedllm_flwr.simulation.resources import join_cluster, start_ray

_INTERRUPTED = 130  # exit status


@contextlib.contextmanager
def ray_clients(config: Config, num_clients: int, state_dir: Path) -> Iterator[Grid]:
    """Start Ray and Flower's simulation engine, and end both after the context.

    Nothing is left running: Ray's processes are children of this one, and the engine is a thread.

    Raises:
        FederationError: Ray cannot start, there is no cluster at ``federation.ray_address``, or the
            engine has failed (raised at the next use of the grid).
        ConfigError: a client needs more than any machine of that cluster has.
    """
    with contextlib.ExitStack() as stack:
        init_args: dict[str, Any] = {"logging_level": "critical", "log_to_driver": False}
        if address := config.federation.ray_address:
            init_args["address"] = address
            with _interrupts_postponed():
                join_cluster(address, init_args, config.federation)
        else:
            # Without an address, Ray would join any cluster that runs on this machine.
            folder = stack.enter_context(private_ray())
            init_args |= {"address": "local", "_temp_dir": str(folder)}
            try:
                with _interrupts_postponed():
                    start_ray(init_args)
            except FederationError:
                raise
            except Exception as error:  # Ray raises many kinds
                raise _engine_failed(error) from error
        resources = {
            "num_cpus": config.federation.client_cpus,
            "num_gpus": config.federation.client_gpus,
        }
        backend = {"init_args": init_args, "client_resources": resources}
        # Flower would log stack traces of errors that the run reports itself.
        log = logging.getLogger("flwr")
        stack.callback(setattr, log, "disabled", log.disabled)
        log.disabled = True
        yield stack.enter_context(_flower_engine(num_clients, backend, state_dir))


@contextlib.contextmanager
def _flower_engine(num_clients: int, backend: Any, state_dir: Path) -> Iterator[Grid]:
    """Run Flower's engine in a thread, which passes the clients' messages to Ray's workers.

    Flower calls a ServerApp in a further thread. The ServerApp here only passes its grid on, and
    waits until the context ends. A second Ctrl-C while the engine ends kills the process.
    """
    from flwr.simulation import run_simulation

    from fedllm_flwr.client.app import app as client_app

    grids: SimpleQueue[Grid | None] = SimpleQueue()
    served = threading.Event()
    errors: list[BaseException] = []
    server_app = ServerApp()

    @server_app.main()
    def hand_out_grid(grid: Grid, context: Context) -> None:
        grids.put(grid)
        served.wait()

    def run_engine() -> None:
        try:
            nodes = min(num_clients, MOST_NODES)
            run_simulation(server_app, client_app, nodes, backend_config=backend)
        except (Exception, SystemExit) as error:
            errors.append(error)
        grids.put(None)

    def check_engine() -> None:
        if errors:
            raise _engine_failed(errors[0]) from errors[0]

    engine = threading.Thread(target=run_engine, name="simulation engine", daemon=True)
    engine.start()
    try:
        grid = grids.get()
        check_engine()
        assert grid is not None
        yield SimulationGrid(grid, num_clients, state_dir, check_engine)
    except BaseException:
        served.set()
        try:
            engine.join()
        except KeyboardInterrupt:
            os._exit(_INTERRUPTED)
        raise
    served.set()
    engine.join()
    check_engine()


def _engine_failed(error: BaseException) -> FederationError:
    return FederationError(
        f"the Ray engine failed ({first_line(error.__cause__ or error)}); run `fedllm doctor`, "
        "or use federation.engine=inprocess."
    )


@contextlib.contextmanager
def _interrupts_postponed() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the context ends: a half-started Ray leaves processes behind.

    The previous handlers are restored afterwards, as Ray sets its own for SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield
    except SystemExit as error:  # raised by Ray's handler of SIGTERM
        raise KeyboardInterrupt from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt
