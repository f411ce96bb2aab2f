"""The server's side of a run, whatever engine carries its messages."""

from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fedllm_flwr import __version__
from fedllm_flwr.adapters import save_adapter
from fedllm_flwr.checkpoint import ServerState, load_state, write_atomically
from fedllm_flwr.config import Config
from fedllm_flwr.data.partition import ClientStats
from fedllm_flwr.data.partition import describe as describe_clients
from fedllm_flwr.params import num_values
from fedllm_flwr.preparation import Prepared, prepare
from fedllm_flwr.progress import Progress
from fedllm_flwr.reporting.clients import clients_table
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.reporting.metrics import summarise
from fedllm_flwr.reporting.plan import Plan
from fedllm_flwr.run_directory import RunDirectory
from fedllm_flwr.schedule import num_sampled
from fedllm_flwr.strategies import STRATEGIES
from fedllm_flwr.strategies.exchange import Roster, check_roster, discover
from fedllm_flwr.timings import Timings
from fedllm_flwr.training.device import describe_device
from fedllm_flwr.wire import wire_bytes

Summary = dict[str, Any]


def serve(
    grid: Grid, config: Config, directory: RunDirectory, console: Console, timings: Timings
) -> Summary:
    """Run all rounds that are left and write the results; returns what summary.json holds.

    Args:
        timings: may hold time spent already, such as the start of the program.

    Raises:
        FedLLMError: the run cannot start or cannot go on.
    """
    with timings.phase("start-up"):
        console.status("loading data and model")
        prepared = prepare(config)
        state, warnings = _initial_state(config, directory, prepared)
        stats = _describe_clients(directory, prepared)
        console.status("starting the clients")
        roster = discover(grid, config, prepared.data.partition.num_clients)
        check_roster(roster, config.federation)
    warnings += prepared.data.source.report.lines() if _lost_records(prepared) else []
    console.plan(_plan(config, prepared, roster, directory, state.round + 1, warnings))
    progress = Progress(config, directory, prepared, console, timings, state.round + 1)
    try:
        final = _run_rounds(grid, config, roster, state, progress)
    except BaseException:
        progress.close(succeeded=False)
        raise
    progress.close(succeeded=True)
    return _finish(config, directory, prepared, final, progress, stats, timings)


def _initial_state(
    config: Config, directory: RunDirectory, prepared: Prepared
) -> tuple[ServerState, list[str]]:
    if config.resume is None:
        return ServerState(0, prepared.initial), []
    return load_state(directory.checkpoints)


def _run_rounds(
    grid: Grid, config: Config, roster: Roster, state: ServerState, progress: Progress
) -> ServerState:
    if state.round == 0:
        progress.start(state)
    strategy = STRATEGIES[config.algorithm.name](config, roster, state, progress.hooks)
    strategy.start(grid, ArrayRecord({}), config.federation.num_rounds)
    return strategy.state


def _describe_clients(directory: RunDirectory, prepared: Prepared) -> list[ClientStats]:
    stats = describe_clients(prepared.data.partition)
    write_atomically(directory.path / "clients.csv", clients_table(stats).encode())
    return stats


def _lost_records(prepared: Prepared) -> bool:
    """Whether records were left out or cut, so that the user should know."""
    train = prepared.data.source.report.train
    return bool(train.empty or train.bad or train.duplicates)


def _finish(
    config: Config,
    directory: RunDirectory,
    prepared: Prepared,
    final: ServerState,
    progress: Progress,
    stats: list[ClientStats],
    timings: Timings,
) -> Summary:
    from fedllm_flwr.reporting.plots import plot_clients, plot_curves

    with timings.phase("results"):
        plot_curves(progress.records, directory.curves, _title(config))
        plot_clients(stats, directory.path / "clients.png")
        summary = summarise(progress.records, timings.seconds)
        save_adapter(directory.adapter, prepared.model, final.params, config, summary)
    return summary


def _title(config: Config) -> str:
    return f"{config.algorithm.name} on {config.data.name}, {config.model.name}"


def _plan(
    config: Config,
    prepared: Prepared,
    roster: Roster,
    directory: RunDirectory,
    first_round: int,
    warnings: list[str],
) -> Plan:
    training, federation = config.training, config.federation
    model, evaluation = prepared.model, prepared.evaluation
    num_bytes = wire_bytes(prepared.initial, config.communication.dtype)
    copies = 2 if config.algorithm.name == "scaffold" else 1
    return Plan(
        version=__version__,
        algorithm=config.algorithm.name,
        variant=config.algorithm.variant,
        task=config.task.name,
        model_name=config.model.name,
        model_parameters=model.num_base_parameters,
        model_note=_model_note(config),
        data_name=config.data.name,
        num_clients=len(roster),
        client_names=sorted(roster),
        divided_by=config.partition.column if config.partition.name == "natural" else None,
        trainable_parameters=num_values(prepared.initial),
        bytes_down=copies * num_bytes,
        bytes_up=copies * num_bytes,
        wire_dtype=config.communication.dtype,
        num_rounds=federation.num_rounds,
        first_round=first_round,
        sampled=num_sampled(federation, len(roster)),
        steps_per_round=training.max_steps if training.max_steps > 0 else None,
        epochs=training.num_epochs,
        batch_size=training.batch_size * training.gradient_accumulation_steps,
        device=describe_device(model.device),
        threads=federation.client_cpus,
        output_dir=str(directory.path),
        eval_records=len(evaluation) if evaluation else 0,
        eval_every=config.evaluation.every,
        has_labels=evaluation is not None and evaluation.choices is not None,
        client_eval=config.evaluation.clients,
        warnings=warnings,
    )


def _model_note(config: Config) -> str | None:
    notes = ["embedded"] if config.model.path == "embedded" else []
    if config.quantization.name != "none":
        notes.append(config.quantization.name)
    return ", ".join(notes) or None
