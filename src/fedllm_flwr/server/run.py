"""One run, from a configuration to its closing table."""

import contextlib
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedllm_flwr.config import Config
from fedllm_flwr.config.names import shown
from fedllm_flwr.config.schema import EMBEDDED_DATA
from fedllm_flwr.data.client_data import cache_dir, divided_data
from fedllm_flwr.data.digest import records_digest
from fedllm_flwr.data.federated import load_evaluation_data
from fedllm_flwr.errors import ConfigError, DataError, DivergedError, FedLLMError, RunInterrupted
from fedllm_flwr.federation.state import newest_round
from fedllm_flwr.files import write_atomically
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.reporting.metrics import (
    Record,
    earlier_phases,
    name_of_start,
    read_metrics,
    summarise,
    write_summary,
)
from fedllm_flwr.reporting.table import is_past_best
from fedllm_flwr.reporting.trackers import check_trackers
from fedllm_flwr.runs.directory import (
    RunDirectory,
    already_finished,
    best_round,
    continue_with,
    create,
    discard,
    how_to_go_on,
    is_finished,
    reopen,
)
from fedllm_flwr.runs.fit import check_fit
from fedllm_flwr.runs.lock import held
from fedllm_flwr.runs.timings import Timings
from fedllm_flwr.simulation import find_engine
from fedllm_flwr.simulation.resources import check_machine
from fedllm_flwr.tasks import task_of

_NODES_S = 10.0  # seconds within which Flower's simulation has started its nodes


def run_simulation(config: Config, console: Console, started: float) -> RunDirectory:
    """Run a configuration on the engine that ``federation.engine`` names.

    Args:
        started: time.monotonic() at the start of the program, counted as start-up.

    Raises:
        FedLLMError: with one line for the user.
        KeyboardInterrupt: the user stopped it; the last checkpoint stays.
    """
    config = with_absolute_paths(config)
    if (done := _finished_before(config, console)) is not None:
        return done
    console.status("reading the data")
    engine = find_engine(config.federation.engine)
    check_machine(config)
    check_fit(config)
    _, clients = divided_data(config, task_of(config).records)
    return _carry_out(
        config, console, started, lambda main: engine(config, clients.num_clients, main)
    )


def run_on_grid(
    config: Config, grid: Grid, console: Console, run_id: int, command: str = "flwr run . --stream"
) -> RunDirectory:
    """Run a configuration with the clients behind `grid`, which Flower has started as `run_id`.

    Args:
        command: that has started it, for what the user should have typed.

    Raises:
        FedLLMError: with one line for the user.
    """
    config = with_absolute_paths(config)
    if (done := _finished_before(config, console)) is not None:
        return done
    check_fit(config)
    if config.federation.engine != "deployment":
        _, clients = divided_data(config, task_of(config).records)
        _check_nodes(grid, clients.num_clients, command)

    def engine(main: Callable[[Grid], None]) -> None:
        with _state_dir_of(run_id):
            main(grid)

    return _carry_out(config, console, time.monotonic(), engine, str(run_id))


def check_data(directory: RunDirectory, config: Config) -> None:
    """Write down which records a new run has, and refuse others when it goes on.

    Raises:
        DataError: names the file, and both digests.
    """
    kind = task_of(config).records
    if config.federation.engine == "deployment":  # each site looks after its own
        records = {"data.eval_path": load_evaluation_data(config, kind)}
    else:
        source = divided_data(config, kind)[0]
        records = {"data.path": source.train, "data.eval_path": source.eval}
    now = {key: records_digest(some) for key, some in records.items() if some is not None}
    if not directory.data.is_file():
        write_atomically(directory.data, json.dumps(now, indent=2).encode())
        return
    before = json.loads(directory.data.read_text(encoding="utf-8"))
    for key, digest in now.items():
        if before.get(key, digest) != digest:
            path = config.data.path if key == "data.path" else config.data.eval_path
            raise DataError(
                f"{key}={shown(path or config.data.path or config.data.hub_id)}: its records are "
                f"not those that the run in {directory.path} was begun with (SHA-256 {digest[:12]} "
                f"now, {before[key][:12]} then), and going on would mix two experiments; bring "
                "them back, or start a new run."
            )


def _check_nodes(grid: Grid, num_clients: int, command: str) -> None:
    """Refuse a simulation of Flower's with other nodes than the data make clients.

    Raises:
        ConfigError: with the command to paste.
    """
    deadline = time.monotonic() + _NODES_S
    while (nodes := len(list(grid.get_node_ids()))) < num_clients and time.monotonic() < deadline:
        time.sleep(0.2)
    if nodes != num_clients:
        raise ConfigError(
            f"the data make {num_clients} clients, but Flower's simulation has {nodes} nodes; run: "
            f"{command} --federation-config 'num-supernodes={num_clients}'"
        )


@contextlib.contextmanager
def _state_dir_of(run_id: int) -> Iterator[None]:
    """Let simulated clients find the run's directory, though their processes may be older."""
    link = cache_dir() / "state" / str(run_id)
    with contextlib.suppress(OSError):  # then they keep their state in a directory of this name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.environ["FEDLLM_STATE_DIR"], target_is_directory=True)
    try:
        yield
    finally:
        if link.is_symlink():
            link.unlink()


def _carry_out(
    config: Config,
    console: Console,
    started: float,
    engine: Callable[[Callable[[Grid], None]], None],
    flower_run: str = "",
) -> RunDirectory:
    """Open the run's directory, serve its rounds, and close with the table of results."""
    check_trackers(config.tracking)
    if config.resume:
        directory, notes = reopen(config)
        for line in notes:
            console.note(line)
    else:
        directory = create(config)
    os.environ["FEDLLM_STATE_DIR"] = str(directory.client_states.resolve())
    timings = Timings(_earlier(directory) if config.resume else None)
    command = _resuming_command(config)
    with held(directory, command, flower_run):
        if config.resume:
            check_data(directory, config)
            continue_with(directory, config)
        with _saying_how_to_go_on(directory, config, command):
            from fedllm_flwr.server.serve import serve

            if not config.resume:
                check_data(directory, config)
            timings.seconds["start-up"] += time.monotonic() - started
            engine(lambda grid: serve(grid, config, directory, console, timings))
        _close(config, directory, console, timings, time.monotonic() - started)
    return directory


def _finished_before(config: Config, console: Console) -> RunDirectory | None:
    """The directory of a run that has nothing left to do, after saying so; None for another."""
    if config.resume is None:
        return None
    directory, _ = reopen(config)
    if not is_finished(directory, config):
        return None
    console.note(already_finished(directory, config))
    return directory


def _earlier(directory: RunDirectory) -> dict[str, float]:
    """Seconds by phase of the starts before this one."""
    records = read_metrics(directory.metrics) if directory.metrics.is_file() else []
    return earlier_phases(directory.summary, records, newest_round(directory.checkpoints) or 0)


def _close(
    config: Config, directory: RunDirectory, console: Console, timings: Timings, seconds: float
) -> None:
    """Write the summary and show it; `seconds` are those of this start."""
    records = read_metrics(directory.metrics)
    total = sum(timings.earlier.values()) + seconds
    summary = summarise(records, timings.seconds, total)
    write_summary(directory.summary, summary)
    shown = _named_anywhere(directory, config)
    console.closing(
        summary,
        _paths(shown, summary["rounds"]),
        rows=_rows_alone(records),
        next_commands=_next_commands(shown, config, summary),
        label=_LABELS.get(config.algorithm.name, "federated"),
        first=name_of_start(config.init_adapter),
        since_resumed=seconds if timings.earlier else None,
    )


Scores = dict[str, float]

_LABELS = {"local": "local (mean)", "centralized": "centralized"}


def _rows_alone(records: list[Record]) -> list[tuple[str, Scores]]:
    """Best and worst of clients that trained alone, by loss."""
    each: dict[str, Scores] = records[-1].get("local", {}) if records else {}
    ranked = sorted(each, key=lambda name: each[name]["loss"])
    if not ranked:
        return []
    best, worst = ranked[0], ranked[-1]
    return [(f"best ({best})", each[best]), (f"worst ({worst})", each[worst])]


def _resuming_command(config: Config) -> str:
    """What goes on with a stopped run, given ``resume=``; a server's app runs in its directory."""
    if config.federation.engine == "deployment":
        return f"fedllm server run {shlex.quote(str(Path.cwd()))}"
    return "fedllm run"


@contextlib.contextmanager
def _saying_how_to_go_on(directory: RunDirectory, config: Config, command: str) -> Iterator[None]:
    """Add to a failure or an interrupt what is kept of the run, and the command to go on."""
    try:
        yield
    except DivergedError as error:
        raise DivergedError(
            f"{error} Training has left the finite numbers and would do so again: start anew with "
            f"a lower training.learning_rate than {config.training.learning_rate:g}."
        ) from error
    except (FedLLMError, KeyboardInterrupt) as error:
        kept = how_to_go_on(directory, command)
        if kept is None:
            discard(directory)
        if isinstance(error, KeyboardInterrupt):
            kept = kept or "nothing was kept, no round had begun."
            raise RunInterrupted(f"interrupted; {kept}") from error
        raise type(error)(f"{error} ({kept})" if kept else str(error)) from error
    except Exception:
        if how_to_go_on(directory, command) is None:
            discard(directory)
        raise


def _named_anywhere(directory: RunDirectory, config: Config) -> RunDirectory:
    """A server's app runs in its own directory, and who reads its log in another."""
    if config.federation.engine != "deployment":
        return directory
    return RunDirectory(directory.path.resolve())


def _paths(directory: RunDirectory, last_round: int) -> dict[str, Path]:
    """What a finished run has written, by label."""
    if directory.adapter.is_dir():
        trained = {"adapter": directory.adapter}
    else:
        trained = {"adapters": directory.adapters}
    also = {"curves": directory.curves, "log": directory.metrics, "answers": directory.answers}
    if (best := best_round(directory)) is not None and best != last_round:
        each = directory.adapters_best
        trained |= {f"best (round {best})": each if each.is_dir() else directory.adapter_best}
    return trained | {label: path for label, path in also.items() if path.is_file()}


def _next_commands(
    directory: RunDirectory, config: Config, summary: Mapping[str, Any]
) -> list[str]:
    task = task_of(config)
    if not directory.adapter.is_dir():
        return [f"{task.command} algorithm=fedavg"]
    example = task.prompts.get(config.data.name, "...")
    other = "fedprox" if config.algorithm.name != "fedprox" else "fedavg"
    chosen = "@best" if is_past_best(summary) else ""
    generate = f'fedllm generate {directory.path}{chosen} "{example}"'
    at_sites = config.federation.engine == "deployment"
    return [generate] if at_sites else [generate, f"{task.command} algorithm={other}"]


def with_absolute_paths(config: Config) -> Config:
    """The configuration with its files named from the root: it means the same in any directory."""

    def absolute(path: str | None) -> str | None:
        if path is None or path in EMBEDDED_DATA:
            return path
        file = Path(path).expanduser()
        return str(file.resolve()) if file.exists() else path

    data = replace(
        config.data, path=absolute(config.data.path), eval_path=absolute(config.data.eval_path)
    )
    model = replace(config.model, path=str(absolute(config.model.path)))
    dpo = replace(config.dpo, reference_adapter=absolute(config.dpo.reference_adapter))
    init_adapter = absolute(config.init_adapter)
    return replace(config, data=data, model=model, dpo=dpo, init_adapter=init_adapter)
