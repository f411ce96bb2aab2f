"""Experiment trackers: TensorBoard, Weights & Biases, MLflow and trackio."""

import contextlib
import importlib.util
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import TrackingConfig
from fedllm_flwr.errors import ConfigError, first_line
from fedllm_flwr.files import write_atomically
from fedllm_flwr.reporting.measures import (
    CONTRIBUTIONS,
    DRIFT,
    MEGABYTES,
    SECONDS,
    client_spread,
    costs,
)
from fedllm_flwr.reporting.metrics import RoundRecord

TRACKERS = (
    "tensorboard",
    "wandb",
    "mlflow",
    "trackio",
)  # keys of the section, and names of the packages

logger = logging.getLogger(__name__)

_CONNECT_S = 5.0
_TRACKER_IDS = "trackers.json"  # in the run's directory


class Tracker(Protocol):
    """The run of one tracker."""

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """Send the scalars of one round, by name."""

    def add_files(self, files: Sequence[Path]) -> None:
        """Attach figures and reports to the run."""

    def close(self, succeeded: bool = True) -> None:
        """Flush, and mark the run as finished or failed."""


def check_trackers(tracking: TrackingConfig) -> None:
    """Check that the trackers' libraries are installed and an MLflow server accepts connections.

    MLflow itself retries an unreachable server for many minutes.

    Raises:
        ConfigError: a library is missing, or the server does not respond.
    """
    for name in TRACKERS:
        if getattr(tracking, name) and importlib.util.find_spec(name) is None:
            extra = "trackio" if name == "trackio" else "tracking"
            raise ConfigError(
                f"tracking.{name}=true, but {name} is not installed; "
                f"pip install 'fedllm-flwr[{extra}]', or leave it out."
            )
    parts = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    proxied = parts.scheme in getproxies() and not proxy_bypass(parts.hostname or "")
    remote = parts.scheme in ("http", "https") and parts.hostname
    if not tracking.mlflow or not remote or proxied:
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"tracking.mlflow=true: MLFLOW_TRACKING_URI={parts.scheme}://{parts.hostname}:{port} "
            f"does not respond within {_CONNECT_S:g} s ({error.strerror or error}); "
            f"{_REMEDIES['mlflow']}."
        ) from error


def open_trackers(config: Config, run_dir: Path) -> "Trackers":
    """All trackers of ``config.tracking``; a resumed run continues in the tracker's run.

    Raises:
        ConfigError: a library is missing, or a tracker cannot start (not logged in, no server).
    """
    check_trackers(config.tracking)
    opened: dict[str, Tracker] = {}
    for name, make in _MAKERS.items():
        if not getattr(config.tracking, name):
            continue
        try:
            opened[name] = make(config, run_dir)
        except Exception as error:  # each library has its own exceptions
            Trackers(opened).close(succeeded=False)
            raise ConfigError(
                f"tracking.{name}=true: cannot start ({first_line(error)}); {_REMEDIES[name]}."
            ) from error
    return Trackers(opened)


def attach_files(config: Config, run_dir: Path, files: Sequence[Path]) -> str:
    """Attach files to the trackers' runs of a finished run; a line about failures, or ""."""
    try:
        trackers = open_trackers(config, run_dir)
    except ConfigError as error:
        return f"warning: figures and report are not attached, {error}"
    trackers.add_files(files)
    trackers.close()
    return ""


class Trackers:
    """Several trackers as one. A tracker that fails is dropped, and the run continues."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def log(self, records: Sequence[RoundRecord]) -> None:
        """Send the scalars of the last record to every tracker."""
        if self._trackers:
            spent = {name: values[-1] for name, values in totals(records).items()}
            number, values = int(records[-1]["round"]), scalars(records[-1]) | spent
            self._each(lambda tracker: tracker.log(number, values))

    def add_files(self, files: Sequence[Path]) -> None:
        """Attach the files that exist to every tracker's run."""
        there = [file for file in files if file.is_file()]
        self._each(lambda tracker: tracker.add_files(there))

    def close(self, succeeded: bool = True) -> None:
        """Close every tracker."""
        self._each(lambda tracker: tracker.close(succeeded))
        self._trackers = {}

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # each library has its own exceptions
                del self._trackers[name]
                logger.warning(
                    "tracking.%s: %s; this tracker is disabled, metrics.jsonl has everything",
                    name,
                    first_line(error),
                )


def scalars(record: RoundRecord) -> dict[str, float]:
    """Numbers of a record by slash-separated name, such as ``client/banking/loss``.

    Names consist of letters, digits, spaces and ``_-./``, which every tracker accepts; other
    characters become underscores.
    """
    renamed = {
        "train/loss": record.get("loss"),
        "train/learning_rate": record.get("learning_rate"),
        "train/failures": len(record["failures"]) if "failures" in record else None,
        "train/aggregation_error": record.get("aggregation_error"),
        "privacy/epsilon": record.get("epsilon"),
        "system/round_seconds": record.get("seconds"),
        "system/bytes_up": record.get("bytes_up"),
        "system/bytes_down": record.get("bytes_down"),
        "client_eval/loss": (record.get("client_eval") or {}).get("loss"),
    }
    renamed |= {f"eval/{key}": value for key, value in (record.get("eval") or {}).items()}
    scored = record.get("local") or (record.get("client_eval") or {}).get("clients") or {}
    for prefix, found in (("", record.get("clients") or {}), ("eval/", scored)):
        for name, metrics in found.items():
            client = f"client/{name.replace('/', '_')}/{prefix}"
            renamed |= {f"{client}{key}": value for key, value in metrics.items()}
    for key in (*DRIFT, *CONTRIBUTIONS, "cut"):
        for name, value in (record.get(key) or {}).items():
            renamed[f"client/{name.replace('/', '_')}/{key}"] = value
    for key in DRIFT:
        if values := [*(record.get(key) or {}).values()]:
            renamed |= {f"drift/{key}_mean": fmean(values), f"drift/{key}_lowest": min(values)}
    if (spread := client_spread(record)) is not None:
        for part in ("mean", "best", "worst", "range", "deviation"):
            renamed[f"fairness/{spread.metric}_{part}"] = getattr(spread, part)
    return {
        re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII): float(value)
        for name, value in renamed.items()
        if isinstance(value, int | float)
    }


def totals(records: Sequence[RoundRecord]) -> dict[str, list[float]]:
    """Cumulative cost up to each record, to plot scores against."""
    spent = costs(records)
    return {
        "system/total_megabytes": spent[MEGABYTES],
        "system/total_seconds": spent[SECONDS],
    }


class _TensorBoard:
    def __init__(self, config: Config, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))
        if "tensorboard" not in _tracker_ids(run_dir):
            self._writer.add_text("config", f"```\n{json.dumps(asdict(config), indent=2)}\n```")
            _keep_tracker_id(run_dir, "tensorboard", run_dir.name)

    def log(self, round: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=round)
        self._writer.flush()

    def add_files(self, files: Sequence[Path]) -> None:
        from matplotlib.image import imread

        for file in files:
            if file.suffix == ".png":
                self._writer.add_image(f"figures/{file.stem}", imread(file), dataformats="HWC")

    def close(self, succeeded: bool = True) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=config.tracking.project,
            name=run_dir.name,
            group=config.tracking.group,
            tags=_tags(config),
            dir=str(run_dir),
            config=asdict(config),
            id=_tracker_ids(run_dir).get("wandb"),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )
        _keep_tracker_id(run_dir, "wandb", self._run.id)

    def log(self, round: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "round": round}, step=round)

    def add_files(self, files: Sequence[Path]) -> None:
        import wandb

        for file in files:
            if file.suffix == ".png":
                self._run.log({f"figures/{file.stem}": wandb.Image(str(file))})
            artifact = wandb.Artifact(f"{self._run.id}-{file.stem}", type=file.suffix[1:])
            artifact.add_file(str(file))
            self._run.log_artifact(artifact)

    def close(self, succeeded: bool = True) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


class _MLflow:
    """Logs to MLFLOW_TRACKING_URI, or to MLflow's default store."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # By default, MLflow waits eight times 2 minutes for a server that accepts connections.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs its database tables
        self._client = MlflowClient()
        earlier = _tracker_ids(run_dir).get("mlflow")
        if earlier is None:
            project = config.tracking.project
            found = self._client.get_experiment_by_name(project)
            experiment = found.experiment_id if found else self._client.create_experiment(project)
            tags = dict.fromkeys(_tags(config), "true")
            tags |= {"group": config.tracking.group} if config.tracking.group else {}
            created = self._client.create_run(experiment, run_name=run_dir.name, tags=tags)
            self._run_id: str = created.info.run_id
            _keep_tracker_id(run_dir, "mlflow", self._run_id)
            params = [
                Param(name, str(value)[:500]) for name, value in _flat(asdict(config)).items()
            ]
            for start in range(0, len(params), 100):  # MLflow's limit per request
                self._client.log_batch(self._run_id, params=params[start : start + 100])
        else:
            self._run_id = earlier
            self._client.update_run(earlier, status="RUNNING")

    def log(self, round: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, round) for name, value in values.items()]
        for start in range(0, len(metrics), 1000):  # MLflow's limit per request
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])

    def add_files(self, files: Sequence[Path]) -> None:
        for file in files:
            self._client.log_artifact(self._run_id, str(file))

    def close(self, succeeded: bool = True) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if succeeded else "FAILED")


class _Trackio:
    """Logs to trackio's local store, or to the server of TRACKIO_SERVER_URL or TRACKIO_SPACE_ID."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import trackio

        earlier = _tracker_ids(run_dir).get("trackio")
        # trackio identifies a run by its name, which runs in other folders can share.
        name = earlier or f"{run_dir.name}-{secrets.token_hex(3)}"
        with contextlib.redirect_stdout(None):  # it prints how to start its dashboard
            self._run = trackio.init(
                project=config.tracking.project,
                name=name,
                group=config.tracking.group,
                config=_flat(asdict(config)) | {"tags": _tags(config)},
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        _keep_tracker_id(run_dir, "trackio", name)

    def log(self, round: int, values: Mapping[str, float]) -> None:
        self._run.log({**values}, step=round)

    def add_files(self, files: Sequence[Path]) -> None:
        for file in files:
            self._run.log_artifact(file, name=f"{self._run.name}-{file.stem}", type=file.suffix[1:])

    def close(self, succeeded: bool = True) -> None:
        with contextlib.redirect_stdout(None):
            self._run.finish()


def _tags(config: Config) -> list[str]:
    """Tags to filter lists of runs by."""
    chosen = [config.algorithm.name, config.data.name, config.model.name, config.task.name]
    return [*chosen, *config.tracking.tags]


def _tracker_ids(run_dir: Path) -> dict[str, str]:
    """The trackers' ids of this run, from an earlier start."""
    file = run_dir / _TRACKER_IDS
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _keep_tracker_id(run_dir: Path, tracker: str, identity: str) -> None:
    ids = {**_tracker_ids(run_dir), tracker: identity}
    write_atomically(run_dir / _TRACKER_IDS, json.dumps(ids, indent=2).encode())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as a flat dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


_MAKERS: dict[str, Callable[[Config, Path], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}
_REMEDIES = {
    "tensorboard": "set tracking.tensorboard=false",
    "wandb": "wandb login, set WANDB_MODE=offline, or tracking.wandb=false",
    "mlflow": "check MLFLOW_TRACKING_URI, or set tracking.mlflow=false",
    "trackio": "check TRACKIO_DIR and TRACKIO_SERVER_URL, or set tracking.trackio=false",
}
