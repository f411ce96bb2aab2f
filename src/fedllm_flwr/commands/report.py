"""``fedllm report``: write the report of a run, a comparison or an evaluation as HTML."""

from collections.abc import Sequence
from pathlib import Path

from fedllm_flwr.commands.compare.command import SAVED
from fedllm_flwr.commands.compare.command import write_report as write_comparison_report
from fedllm_flwr.commands.evaluate.page import RESULTS
from fedllm_flwr.commands.evaluate.page import write_report as write_evaluation_report
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.report import write_run_report


def report(directories: Sequence[str], output: str | None) -> int:
    """Write the report of each directory, and print its path.

    Args:
        output: file of a single report; None: ``report.html`` in each directory.

    Raises:
        ConfigError: a directory contains none of the three, or several reports would share a file.
    """
    if output is not None and len(directories) > 1:
        raise ConfigError(f"--output {output}: one file for {len(directories)} pages; give one.")
    for typed in directories:
        folder = Path(typed).expanduser()
        print(_write(folder, None if output is None else Path(output).expanduser()))
    return 0


def _write(folder: Path, output: Path | None) -> Path:
    if (folder / SAVED).is_file():
        return write_comparison_report(folder, output=output)
    if (folder / RESULTS).is_file():
        return write_evaluation_report(folder, output)
    if (folder / "config.yaml").is_file():
        return write_run_report(RunDirectory(folder), output)
    raise ConfigError(
        f"{folder}: neither a run (config.yaml), a comparison ({SAVED}) nor an evaluation "
        f"({RESULTS}); give the directory of one."
    )
