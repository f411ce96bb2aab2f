"""The server side of a run, for every engine."""

import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fedllm_flwr.config import Config
from fedllm_flwr.deployment.site_keys import registered_keys, registered_sites
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.federation.census import discover, known
from fedllm_flwr.federation.roster import check_roster, unlike_models
from fedllm_flwr.federation.round_store import folder_name
from fedllm_flwr.federation.state import ServerState, load_state
from fedllm_flwr.federation.strategies import strategy_of
from fedllm_flwr.files import write_atomically
from fedllm_flwr.reporting.clients import clients_table, plot_clients, sizes_table
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.reporting.metrics import RoundRecord, summarise, why_stopped
from fedllm_flwr.runs.adapter_files import save_adapter
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.fit import scored_on_one
from fedllm_flwr.runs.timings import Timings
from fedllm_flwr.server.planning import make_plan
from fedllm_flwr.server.preparation import Prepared, prepare
from fedllm_flwr.server.run_recorder import RunRecorder
from fedllm_flwr.tasks import task_of

logger = logging.getLogger(__name__)


def serve(
    grid: Grid, config: Config, directory: RunDirectory, console: Console, timings: Timings
) -> None:
    """Run all remaining rounds and write the results to the run's directory.

    Args:
        timings: may already contain time, such as that of the program's start.

    Raises:
        FedLLMError: the run cannot start or cannot continue.
    """
    with timings.phase("start-up"):
        console.status("loading data and model")
        prepared = prepare(config)
        patience = config.training.early_stopping
        if patience is not None and prepared.evaluation is None and not config.evaluation.clients:
            raise ConfigError(
                f"training.early_stopping={patience} needs scores, and there are no held-out "
                "records; give data.eval_path, or evaluation.clients=true."
            )
        if config.evaluation.contribution != "none" and prepared.evaluation is None:
            raise ConfigError(
                f"evaluation.contribution={config.evaluation.contribution} compares losses on "
                "central held-out records, and there are none; give data.eval_path."
            )
        warnings: list[str] = []
        if config.resume is None:
            run = secrets.token_hex(8)
            state = ServerState(0, prepared.initial, sent=prepared.sent, run=run)
        else:
            state, warnings = load_state(directory.checkpoints)
        is_deployment = config.federation.engine == "deployment"
        if is_deployment:
            console.status("waiting for the sites")
            # The app of a deployment runs in the directory made by `fedllm server init`.
            registered, keys = registered_sites(Path.cwd()), registered_keys(Path.cwd())
            census = discover(grid, config, prepared.num_clients, console.status, registered, keys)
        elif config.privacy.secure_aggregation:  # the server does not know the clients' keys
            census = discover(grid, config, prepared.num_clients)
        else:
            census = known(grid, config, prepared.sizes)
        roster = dict(sorted(census.clients.items()))
        check_roster(roster, config)
        sizes = {name: client.info.num_examples for name, client in roster.items()}
        table = clients_table(prepared.clients) if prepared.clients else sizes_table(sizes)
        write_atomically(directory.clients, table.encode())
    warnings += [*prepared.warnings, *scored_on_one(config, sizes), *unlike_models(roster)]
    warnings += [f"{name} cannot take part: {why}" for name, why in sorted(census.refused.items())]
    if len(roster) < prepared.num_clients:
        warnings.append(f"starting with {len(roster)} of {prepared.num_clients} clients")
    console.plan(make_plan(config, prepared, roster, directory, state.round + 1, warnings))
    recorder = RunRecorder(
        config, directory, prepared, console, timings, state.round + 1, census.refused
    )
    try:
        for line in recorder.restore_best() if state.round else ():
            console.note(line)
        if state.round == 0:
            recorder.start(state)
        strategy = strategy_of(config)(config, roster, state, recorder, directory.known_clients)
        strategy.start(grid, ArrayRecord({}), config.federation.num_rounds)
        final = strategy.state
        if final.round < config.federation.num_rounds:
            console.note(why_stopped(recorder.records, final.round))
    except BaseException:
        recorder.close(succeeded=False)
        raise
    recorder.close(succeeded=True)
    with timings.phase("results"):
        export(config, directory, prepared, final, recorder)
        if config.tracking.figures:
            draw_figures(config, directory, prepared, recorder.records, console)


def export(
    config: Config,
    directory: RunDirectory,
    prepared: Prepared,
    final: ServerState,
    recorder: RunRecorder,
) -> None:
    """Write the final adapter, or each client's, and answers to held-out prompts."""
    summary = summarise(recorder.records, recorder.timings.seconds)
    adapters = {directory.adapter: final.adapter}
    answering, label = final.adapter, "with the adapter"
    if config.algorithm.name == "local":
        own = {
            name: recorder.local_adapters.load(name, client)
            for name, client in final.clients.items()
            if client.round
        }
        adapters = {directory.adapters / folder_name(name): own[name] for name in own}
        if each := recorder.records[-1].get("local", {}):
            best = min(each, key=lambda name: each[name]["loss"])
            answering, label = own[best], f"with the adapter of {best}, the best client"
    for path, params in adapters.items():
        save_adapter(path, prepared.model, params, config, summary)
    evaluation = prepared.evaluation
    if evaluation is not None and evaluation.num_prompts:
        shown = evaluation.side_by_side(prepared.model, answering, label)
        write_atomically(directory.answers, shown.encode())


def draw_figures(
    config: Config,
    directory: RunDirectory,
    prepared: Prepared,
    records: Sequence[RoundRecord],
    console: Console,
) -> None:
    """Draw the run's curves and its clients' sizes; a failed figure is only a warning."""
    from fedllm_flwr.reporting.plots import plot_curves

    title = f"{config.algorithm.name} on {config.data.name}, {config.model.name}"
    drawings: dict[str, Callable[[], None]] = {
        "curves": lambda: plot_curves(records, directory.curves, title, task_of(config))
    }
    if clients := prepared.clients:
        file = directory.path / "clients.png"
        drawings["clients"] = lambda: plot_clients(clients, file)
    for name, draw in drawings.items():
        try:
            draw()
        except Exception as error:  # plotting libraries raise many kinds
            logger.exception("figure %s", name)
            console.note(
                f"warning: no figure of the {name} ({type(error).__name__}: {error}); everything "
                "else of the run is written"
            )
