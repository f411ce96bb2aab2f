"""The Flower ServerApp for ``flwr run``: from a run config to a run directory."""

import logging
import shlex
import sys
import threading
import time

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedllm_flwr.deployment.flower import DRY_RUN
from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.errors import FederationError, FedLLMError
from fedllm_flwr.flower.runtime import is_engine_grid
from fedllm_flwr.runs.crash_log import explain_crash

prepare_environment()
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation described by the run config, see `config.compose.from_run_config`.

    Raises:
        FedLLMError: after printing its one line, so that Flower marks the run as failed.
    """
    from fedllm_flwr.config.compose import from_run_config
    from fedllm_flwr.reporting.console import Console, print_error

    asked = dict(context.run_config)
    is_dry = asked.pop(DRY_RUN, "") == "yes"
    try:
        with Console(interactive=False) as console:
            config = from_run_config(asked)
            if is_engine_grid(grid):
                wait_for_ray()
            from fedllm_flwr.server.dry_run import rehearse
            from fedllm_flwr.server.run import run_on_grid

            if is_dry:
                rehearse(config, grid, console)
            else:
                # The command that has started the run, as typed in a checkout.
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
    """Wait until Flower's engine has started Ray in another thread, before loading anything.

    Ray gives its own processes fixed limits of 15 and 30 s to start. On a busy machine they would
    miss them while this server imports torch and reads a model.
    """
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        # The other thread may still be importing it.
        is_initialized = getattr(sys.modules.get("ray"), "is_initialized", None)
        if is_initialized is not None and is_initialized():
            return
        time.sleep(0.1)


def _keep_trace_away(error: FedLLMError) -> None:
    """Suppress the traceback of a printed error, with which Flower would end a thread."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not error:
            before(arguments)

    threading.excepthook = hook
