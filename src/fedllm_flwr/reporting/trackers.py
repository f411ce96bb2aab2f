"""TensorBoard, Weights & Biases and MLflow, through their own libraries."""

import importlib.util
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import TrackingConfig
from fedllm_flwr.errors import ConfigError, first_line
from fedllm_flwr.files import write_atomically
from fedllm_flwr.reporting.metrics import RoundRecord

TRACKERS = ("tensorboard", "wandb", "mlflow")  # keys of the section, and names of the packages

logger = logging.getLogger(__name__)

_CONNECT_S = 5.0
_TRACKER_IDS = "trackers.json"  # in the run's directory


class Tracker(Protocol):
    """Receives the scalars of each round."""

    def log(self, record: RoundRecord) -> None:
        """Send the scalars of one round."""

    def close(self, succeeded: bool = True) -> None:
        """Flush, and mark the run as finished or failed."""


def check_trackers(tracking: TrackingConfig) -> None:
    """Check the libraries of the chosen trackers, and that an MLflow server accepts connections.

    MLflow itself retries an unreachable server for many minutes.

    Raises:
        ConfigError: a library is missing, or the server does not answer.
    """
    for name in TRACKERS:
        if getattr(tracking, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.{name}=true, but {name} is not installed; "
                "pip install 'fedllm-flwr[tracking]', or leave it out."
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
            f"does not answer within {_CONNECT_S:g} s ({error.strerror or error}); "
            f"{_REMEDIES['mlflow']}."
        ) from error


def open_trackers(config: Config, run_dir: Path) -> Tracker:
    """All trackers of ``config.tracking`` as one; a resumed run continues in the tracker's run.

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


class Trackers:
    """Several trackers as one. A tracker that fails is dropped, and the run goes on."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def log(self, record: RoundRecord) -> None:
        """Send the scalars of one round to every tracker."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(record)
            except Exception as error:
                del self._trackers[name]
                logger.warning(
                    "tracking.%s: %s; no more is sent there, metrics.jsonl has everything",
                    name,
                    first_line(error),
                )

    def close(self, succeeded: bool = True) -> None:
        """Close every tracker."""
        for name, tracker in self._trackers.items():
            try:
                tracker.close(succeeded)
            except Exception as error:
                logger.warning("tracking.%s: %s", name, first_line(error))
        self._trackers = {}


def scalars(record: RoundRecord) -> dict[str, float]:
    """Numbers of a record by slash-separated name, such as ``clients/banking/loss``.

    Names consist of letters, digits, spaces and ``_-./``, which every tracker accepts; other
    characters become underscores.
    """
    renamed = {
        "train/loss": record.get("loss"),
        "train/learning_rate": record.get("learning_rate"),
        "train/failures": len(record["failures"]) if "failures" in record else None,
        "time/round_seconds": record.get("seconds"),
        "comm/bytes_up": record.get("bytes_up"),
        "comm/bytes_down": record.get("bytes_down"),
        "privacy/epsilon": record.get("epsilon"),
        "train/aggregation_error": record.get("aggregation_error"),
    }
    for section in ("eval", "client_eval"):
        renamed |= {f"{section}/{key}": value for key, value in (record.get(section) or {}).items()}
    for name, metrics in (record.get("clients") or {}).items():
        client = name.replace("/", "_")
        renamed |= {f"clients/{client}/{key}": value for key, value in metrics.items()}
    for key in ("update_norm", "update_cosine", "cut"):
        for name, value in (record.get(key) or {}).items():
            renamed[f"clients/{name.replace('/', '_')}/{key}"] = value
    for name, scores in ((record.get("client_eval") or {}).get("clients") or {}).items():
        client = name.replace("/", "_")
        renamed |= {f"clients/{client}/eval/{key}": value for key, value in scores.items()}
    return {
        re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII): float(value)
        for name, value in renamed.items()
        if isinstance(value, int | float)
    }


class _TensorBoard:
    def __init__(self, config: Config, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))
        self._writer.add_text("config", f"```\n{json.dumps(asdict(config), indent=2)}\n```")

    def log(self, record: RoundRecord) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, global_step=record["round"])
        self._writer.flush()

    def close(self, succeeded: bool = True) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=config.tracking.project,
            name=run_dir.name,
            dir=str(run_dir),
            config=asdict(config),
            id=_tracker_ids(run_dir).get("wandb"),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )
        _keep_tracker_id(run_dir, "wandb", self._run.id)

    def log(self, record: RoundRecord) -> None:
        self._run.log({**scalars(record), "round": record["round"]}, step=record["round"])

    def close(self, succeeded: bool = True) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


class _MLflow:
    """Logs to MLFLOW_TRACKING_URI, or to MLflow's default store."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # By default MLflow waits eight times 2 minutes for a server that accepts a connection.
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
            created = self._client.create_run(experiment, run_name=run_dir.name)
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

    def log(self, record: RoundRecord) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now_ms, record["round"]) for name, value in scalars(record).items()
        ]
        for start in range(0, len(metrics), 1000):  # MLflow's limit per request
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])

    def close(self, succeeded: bool = True) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if succeeded else "FAILED")


def _tracker_ids(run_dir: Path) -> dict[str, str]:
    """Ids of this run by tracker, from an earlier start."""
    file = run_dir / _TRACKER_IDS
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _keep_tracker_id(run_dir: Path, tracker: str, identity: str) -> None:
    ids = {**_tracker_ids(run_dir), tracker: identity}
    write_atomically(run_dir / _TRACKER_IDS, json.dumps(ids, indent=2).encode())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections by dotted key."""
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
}
_REMEDIES = {
    "tensorboard": "set tracking.tensorboard=false",
    "wandb": "wandb login, set WANDB_MODE=offline, or tracking.wandb=false",
    "mlflow": "look at MLFLOW_TRACKING_URI, or set tracking.mlflow=false",
}
