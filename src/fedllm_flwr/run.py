"""One run, from a configuration to its closing table."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flwr.serverapp import Grid

from fedllm_flwr.config import Config
from fedllm_flwr.data.client import divided_data
from fedllm_flwr.engines import find_engine
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.reporting.metrics import read_metrics, summarise, write_summary
from fedllm_flwr.reporting.trackers import check_trackers
from fedllm_flwr.run_directory import RunDirectory, create, reopen
from fedllm_flwr.timings import Timings
from fedllm_flwr.training.tokenizer import model_source


def run_simulation(config: Config, console: Console, started: float) -> RunDirectory:
    """Run a configuration on the engine that ``federation.engine`` names.

    Args:
        started: time.monotonic() at the start of the program, counted as start-up.

    Raises:
        FedLLMError: with one line for the user.
        KeyboardInterrupt: the user stopped it; the last checkpoint stays.
    """
    console.status("reading the data")
    config = with_absolute_paths(config)
    model_source(config.model)
    _, clients = divided_data(config)
    engine = find_engine(config.federation.engine)
    return _carry_out(
        config, console, started, lambda main: engine(config, clients.num_clients, main)
    )


def run_on_grid(config: Config, grid: Grid, console: Console) -> RunDirectory:
    """Run a configuration with the clients behind `grid`, which Flower has started."""
    config = with_absolute_paths(config)
    return _carry_out(config, console, time.monotonic(), lambda main: main(grid))


def _carry_out(
    config: Config,
    console: Console,
    started: float,
    engine: Callable[[Callable[[Grid], None]], None],
) -> RunDirectory:
    """Open the run's directory, serve its rounds, and close with the table of results."""
    check_trackers(config.tracking)
    directory = reopen(config) if config.resume else create(config)
    os.environ["FEDLLM_STATE_DIR"] = str(directory.client_states.resolve())
    timings = Timings()
    timings.seconds["start-up"] = time.monotonic() - started

    def main(grid: Grid) -> None:
        from fedllm_flwr.server import serve

        serve(grid, config, directory, console, timings)

    engine(main)
    seconds = time.monotonic() - started
    summary = summarise(read_metrics(directory.metrics), timings.seconds, seconds)
    write_summary(directory.summary, summary)
    console.closing(summary, _paths(directory), next_commands=_next_commands(directory, config))
    return directory


def _paths(directory: RunDirectory) -> dict[str, Path]:
    """What a finished run has written, by label."""
    return {"adapter": directory.adapter, "curves": directory.curves, "log": directory.metrics}


def _next_commands(directory: RunDirectory, config: Config) -> list[str]:
    example = "Quarterly profit at the bank fell" if config.data.name == "demo" else "..."
    other = "fedprox" if config.algorithm.name != "fedprox" else "fedavg"
    return [
        f'fedllm generate {directory.path} "{example}"',
        f"fedllm run algorithm={other}",
    ]


def with_absolute_paths(config: Config) -> Config:
    """The configuration with its files named from the root: it means the same in any directory."""

    def absolute(path: str | None) -> str | None:
        if path is None or path == "embedded":
            return path
        file = Path(path).expanduser()
        return str(file.resolve()) if file.exists() else path

    data = replace(
        config.data, path=absolute(config.data.path), eval_path=absolute(config.data.eval_path)
    )
    model = replace(config.model, path=str(absolute(config.model.path)))
    return replace(config, data=data, model=model, init_adapter=absolute(config.init_adapter))
