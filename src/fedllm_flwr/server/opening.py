"""Opens a run: directory, lock and data. If the run stops early, reports how to resume it."""

import contextlib
import json
import shlex
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fedllm_flwr.config import Config
from fedllm_flwr.config.names import shown
from fedllm_flwr.config.schema import EMBEDDED_DATA, value_of, with_value
from fedllm_flwr.config.validation import adapter_keys
from fedllm_flwr.data.client_data import divided_data
from fedllm_flwr.data.federated import load_evaluation_data
from fedllm_flwr.data.sources import records_digest
from fedllm_flwr.errors import DataError, DivergedError, FedLLMError, RunInterrupted
from fedllm_flwr.federation.state import newest_round
from fedllm_flwr.files import write_atomically
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.reporting.metrics import earlier_phases, read_metrics
from fedllm_flwr.reporting.trackers import check_trackers
from fedllm_flwr.runs.directory import (
    RunDirectory,
    already_finished,
    continue_with,
    create,
    discard,
    how_to_go_on,
    is_finished,
    reopen,
)
from fedllm_flwr.runs.lock import held
from fedllm_flwr.runs.timings import Timings
from fedllm_flwr.server.closing import close_run
from fedllm_flwr.tasks import task_of


@contextlib.contextmanager
def open_run(
    config: Config, console: Console, started: float, flower_run: str = ""
) -> Iterator[tuple[RunDirectory, Timings]]:
    """Open the directory of a new or resumed run, and hold its lock while the run lasts.

    A run that completes closes with its summary; a run that stops reports how to resume it.

    Args:
        started: time.monotonic() at the start of the program, for the start-up time.
        flower_run: Flower's id of the run, if Flower has started it.

    Raises:
        FedLLMError: with one line for the user.
        RunInterrupted: the user stopped it.
    """
    check_trackers(config.tracking)
    earlier: dict[str, float] = {}
    if config.resume:
        directory, notes = reopen(config)
        for line in notes:
            console.note(line)
        records = read_metrics(directory.metrics) if directory.metrics.is_file() else []
        last = newest_round(directory.checkpoints) or 0
        earlier = earlier_phases(directory.summary, records, last)
    else:
        directory = create(config)
    timings = Timings(earlier)
    command = "fedllm run"
    if config.federation.engine == "deployment":  # the server's app runs in its directory
        command = f"fedllm server run {shlex.quote(str(Path.cwd()))}"
    with held(directory, command, flower_run):
        if config.resume:
            check_data(directory, config)
            continue_with(directory, config)
        with _saying_how_to_go_on(directory, config, command):
            if not config.resume:
                check_data(directory, config)
            timings.seconds["start-up"] += time.monotonic() - started
            yield directory, timings
        close_run(config, directory, console, timings, time.monotonic() - started)


def finished_before(config: Config, console: Console) -> RunDirectory | None:
    """The directory of a run that is already finished, after reporting it; otherwise None."""
    if config.resume is None:
        return None
    directory, _ = reopen(config)
    if not is_finished(directory, config):
        return None
    console.note(already_finished(directory, config))
    return directory


def check_data(directory: RunDirectory, config: Config) -> None:
    """Store the digests of a new run's records; on resume, require the same records.

    Raises:
        DataError: the records differ; names the file and both digests.
    """
    kind = task_of(config).records
    if config.federation.engine == "deployment":  # each site checks its own data
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


@contextlib.contextmanager
def _saying_how_to_go_on(directory: RunDirectory, config: Config, command: str) -> Iterator[None]:
    """Extend a failure or an interrupt by the last saved round, and the command to resume."""
    try:
        yield
    except DivergedError as error:
        raise DivergedError(
            f"{error} Training diverged to NaN or Inf and would do so again: start a new run with "
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


def with_absolute_paths(config: Config) -> Config:
    """The configuration with absolute file paths, which are valid in any working directory."""

    def absolute(path: str | None) -> str | None:
        if path is None or path in EMBEDDED_DATA:
            return path
        file = Path(path).expanduser()
        return str(file.resolve()) if file.exists() else path

    data = replace(
        config.data,
        path=absolute(config.data.path),
        eval_path=absolute(config.data.eval_path),
        test_path=absolute(config.data.test_path),
    )
    model = replace(config.model, path=str(absolute(config.model.path)))
    config = replace(config, data=data, model=model)
    for key in adapter_keys():
        config = with_value(config, key, absolute(value_of(config, key)))
    return config
