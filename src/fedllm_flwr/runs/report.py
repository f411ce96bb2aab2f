"""The report of a run, ``report.html``, from the files in its directory."""

import csv
import hashlib
import json
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import compose, load_run, to_yaml
from fedllm_flwr.config.names import shown
from fedllm_flwr.files import write_atomically
from fedllm_flwr.reporting.html.render import render
from fedllm_flwr.reporting.html.run import RunFacts, run_page
from fedllm_flwr.reporting.metrics import read_metrics
from fedllm_flwr.runs.directory import RunDirectory, differences, is_finished
from fedllm_flwr.runs.lock import holder

REPORT = "report.html"
logger = logging.getLogger(__name__)

_SOFTWARE = ("fedllm-flwr", "flwr", "torch", "transformers", "peft", "bitsandbytes", "datasets")
_OWN_PLACE = ("output_dir", "resume")


def write_run_report(directory: RunDirectory, output: Path | None = None) -> Path:
    """Write the report of a run; returns its path, by default ``report.html`` in the directory.

    Raises:
        FedLLMError: the directory contains no run, or the file cannot be written.
    """
    path = output or directory.report
    write_atomically(path, render(run_page(run_facts(directory))).encode())
    return path


def report_or_warning(write: Callable[[], object]) -> str:
    """Write a report; returns a warning if this fails, otherwise "".

    The run's results are already on disk, and a failing report must not affect them.
    """
    try:
        write()
    except Exception as error:
        logger.exception("report")
        return f"warning: no {REPORT} ({type(error).__name__}: {error}); everything else is written"
    return ""


def run_facts(directory: RunDirectory) -> RunFacts:
    """Read a run's directory, whether it is finished or not.

    Raises:
        ConfigError: the directory contains no run.
        DataError: ``metrics.jsonl`` is damaged.
    """
    config = load_run(directory.path, str(directory.path))
    finished = is_finished(directory, config)
    summary: dict[str, Any] | None = None
    if finished:
        summary = json.loads(directory.summary.read_text("utf-8"))
    who = holder(directory)
    state = "finished" if finished else "running" if who and who.is_alive else "stopped"
    clients: list[dict[str, str]] = []
    if directory.clients.is_file():
        with directory.clients.open(encoding="utf-8", newline="") as file:
            clients = list(csv.DictReader(file))
    return RunFacts(
        name=directory.path.resolve().name,
        config=config,
        records=read_metrics(directory.metrics) if directory.metrics.is_file() else [],
        state=state,
        summary=summary,
        clients=clients,
        changed=changed_from_defaults(config),
        environment=(summary or {}).get("environment") or environment(),
        digests=_digests(directory),
        yaml=to_yaml(replace(config, output_dir=None, resume=None)),
    )


def changed_from_defaults(config: Config) -> dict[str, tuple[str, str]]:
    """Keys that differ from the configuration of a bare ``fedllm run``: value and default."""
    found = differences(asdict(compose()), asdict(config))
    return {
        key: (shown(value), shown(default))
        for key, (default, value) in found.items()
        if key not in _OWN_PLACE
    }


def environment() -> dict[str, str]:
    """Versions of the software that affects a run's numbers, in this process."""
    versions = {
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for name in _SOFTWARE:
        versions[name] = metadata.version(name)
    return versions


def _digests(directory: RunDirectory) -> Mapping[str, str]:
    found: dict[str, str] = {}
    if directory.data.is_file():
        found |= {f"records of {k}": v for k, v in json.loads(directory.data.read_text()).items()}
    for path in (directory.adapter, directory.adapter_best):
        weights = path / "adapter_model.safetensors"
        if weights.is_file():
            with weights.open("rb") as file:
                found[f"{path.name}/{weights.name}"] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return found
