"""The Flower ServerApp for ``flwr run``: a run config comes in, a run directory is left."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedllm_flwr.environment import prepare_environment

prepare_environment()
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes, see `config.compose.from_run_config`."""
    from fedllm_flwr.config.compose import from_run_config
    from fedllm_flwr.reporting.console import Console
    from fedllm_flwr.run import run_on_grid

    with Console(interactive=False) as console:
        run_on_grid(from_run_config(context.run_config), grid, console)
