"""Closes a run: writes its summary, and prints the result and the next steps."""

from pathlib import Path

from fedllm_flwr.config import Config
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.reporting.metrics import name_of_start, read_metrics, summarise, write_summary
from fedllm_flwr.reporting.personal import client_rows
from fedllm_flwr.reporting.table import is_past_best, result_label
from fedllm_flwr.reporting.trackers import attach_files
from fedllm_flwr.runs.directory import RunDirectory, best_round
from fedllm_flwr.runs.report import environment, report_or_warning, write_run_report
from fedllm_flwr.runs.timings import Timings
from fedllm_flwr.tasks import task_of


def close_run(
    config: Config, directory: RunDirectory, console: Console, timings: Timings, seconds: float
) -> None:
    """Write and show the summary; `seconds` is the duration since this start."""
    records = read_metrics(directory.metrics)
    summary = summarise(records, timings.seconds, sum(timings.earlier.values()) + seconds)
    write_summary(directory.summary, summary | {"environment": environment()})
    if config.tracking.report and (
        warning := report_or_warning(lambda: write_run_report(directory))
    ):
        console.note(warning)
    files = [directory.curves, directory.path / "clients.png", directory.report]
    if warning := attach_files(config, directory.path, files):
        console.note(warning)
    at_sites = config.federation.engine == "deployment"
    if at_sites:  # whoever reads the log of a server's app is in another directory
        directory = RunDirectory(directory.path.resolve())
    task = task_of(config)
    if directory.adapter.is_dir():
        chosen = "@best" if is_past_best(summary) else ""
        example = task.prompts.get(config.data.name, "...")
        other = "fedprox" if config.algorithm.name != "fedprox" else "fedavg"
        next_commands = [f'fedllm generate {directory.path}{chosen} "{example}"']
        next_commands += [] if at_sites else [f"{task.command} algorithm={other}"]
    else:
        next_commands = [f"{task.command} algorithm=fedavg"]
    console.closing(
        summary,
        _written(directory, summary["rounds"]),
        rows=client_rows(records),
        next_commands=next_commands,
        label=result_label(config.algorithm.name),
        first=name_of_start(config.init_adapter),
        since_resumed=seconds if timings.earlier else None,
    )


def _written(directory: RunDirectory, last_round: int) -> dict[str, Path]:
    """Paths that a finished run has written, by label."""
    if directory.adapter.is_dir():
        trained = {"adapter": directory.adapter}
    else:
        trained = {"adapters": directory.adapters}
    if (best := best_round(directory)) is not None and best != last_round:
        each = directory.adapters_best
        trained |= {f"best (round {best})": each if each.is_dir() else directory.adapter_best}
    also = {
        "report": directory.report,
        "curves": directory.curves,
        "log": directory.metrics,
        "answers": directory.answers,
    }
    return trained | {label: path for label, path in also.items() if path.is_file()}
