"""The Flower ServerApp for ``flwr run``: from a run config to a run directory."""

import logging
import shlex
import sys
import threading
import time

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from fedllm_flwr.deployment.flower import DRY_RUN
from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.errors import FederationError, FedLLMError
from fedllm_flwr.runs.crash_log import explain_crash

prepare_environment()
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes, see `config.compose.from_run_config`.

    Raises:
        FedLLMError: after its one line is printed, so that Flower marks the run as failed.
    """
    from fedllm_flwr.config.compose import from_run_config
    from fedllm_flwr.reporting.console import Console, print_error

    asked = dict(context.run_config)
    is_dry = asked.pop(DRY_RUN, "") == "yes"
    try:
        with Console(interactive=False) as console:
            config = from_run_config(asked)
            if isinstance(grid, InMemoryGrid):
                wait_for_ray()
            from fedllm_flwr.server.dry_run import rehearse
            from fedllm_flwr.server.run import run_on_grid

            if is_dry:
                rehearse(config, grid, console)
            else:
                # The command that has started the run, as one types it in a checkout.
                given = [f'{key}="{value}"' for key, value in context.run_config.items() if value]
                options = ["--run-config", " ".join(given)] if given else []
                command = shlex.join(["flwr", "run", ".", "--stream", *options])
                run_on_grid(config, grid, console, context.run_id, command)
    except FedLLMError as error:
        print_error(str(error))
        _keep_trace_away(error)
        raise
    except Exception as error:
        failure = FederationError(explain_crash(error, [str(dict(context.run_config))]))
        print_error(str(failure))
        _keep_trace_away(failure)
        raise failure from error


def wait_for_ray(limit_s: float = 120.0) -> None:
    """Load nothing before Flower's engine has started Ray in another thread of this process.

    Ray gives its own processes 15 and 30 s to start, which cannot be changed. On a busy machine
    that is too little for them beside a server that imports torch and reads a model.
    """
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        # The other thread may be about to import it.
        is_initialized = getattr(sys.modules.get("ray"), "is_initialized", None)
        if is_initialized is not None and is_initialized():
            return
        time.sleep(0.1)


def _keep_trace_away(error: FedLLMError) -> None:
    """All that the error has to say is printed; Flower would log it, and let it end a thread."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not error:
            before(arguments)

    threading.excepthook = hook
