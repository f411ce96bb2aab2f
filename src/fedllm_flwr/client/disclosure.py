"""Entries of a site's audit log: each request, and the size of the data that left the site."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedllm_flwr.client.requests import failed
from fedllm_flwr.client.site import Site
from fedllm_flwr.deployment.audit import WAITING, AuditLog, settings_digest
from fedllm_flwr.errors import FederationError, FedLLMError
from fedllm_flwr.federation.wire import MASKED, unpack_config, unpack_failure, unpack_params

_VERDICTS = {"ApprovalPending": WAITING, "ApprovalDeclined": "declined"}


def audited(
    kind: str, asked: RecordDict, reply: RecordDict, site: Site, started: float
) -> RecordDict:
    """Return `reply` after writing it to the audit log, or a failure if the log is not writable.

    A site keeps a log if its node config has ``site-dir``, as `fedllm site init` writes it.

    Args:
        started: time.monotonic() when the message arrived.
    """
    if "site-dir" not in site.node_config:
        return reply
    entry: dict[str, Any] = {
        "event": kind,
        "run": str(site.run_id),
        "server": str(site.node_config.get("server-address", "")),
    }
    settings = None
    try:
        server_round, config = unpack_config(asked)
    except FederationError as error:
        if kind not in ("sign", "unmask"):  # which have no settings, and belong to a logged round
            entry["unreadable"] = str(error)
    else:
        settings = asdict(config)
        entry |= {
            "round": server_round,
            "algorithm": config.algorithm.name,
            "task": config.task.name,
            "model": config.model.path,
            "commit": config.model.revision,
            "settings_digest": settings_digest(settings),
        }
    try:
        if (failure := unpack_failure(reply)) is not None:
            verdict = _VERDICTS.get(failure.kind, "refused")
            entry |= {"verdict": verdict, "reason": failure.reason}
        else:
            entry |= {"verdict": "answered", **disclosed(reply)}
        entry["seconds"] = round(time.monotonic() - started, 3)
        AuditLog(audit_folder(Path(str(site.node_config["site-dir"])))).append(entry, settings)
    except FedLLMError as error:
        return failed(error, site)
    return reply


def audit_folder(site_dir: Path) -> Path:
    """Directory of a site's audit log."""
    return site_dir.expanduser() / "audit"


def disclosed(reply: RecordDict) -> dict[str, Any]:
    """Number of records, and the values, bytes and L2 norms of the tensors in a reply."""
    said: dict[str, Any] = {}
    for record in reply.config_records.values():
        said |= dict(record.items())
    for numbers in reply.metric_records.values():
        said |= dict(numbers.items())
    metrics = reply.metric_records.get("metrics")
    records = said.get("num_examples", 0)
    left: dict[str, Any] = {"records": records, "values": 0, "bytes": 0, "norms": {}}
    for name, arrays in reply.array_records.items():
        if said.get("dtype") == MASKED:  # the norm of masked words is meaningless
            left["values"] += sum(math.prod(array.shape) for array in arrays.values())
            left["bytes"] += sum(len(array.data) for array in arrays.values())
            left["masked"] = True
            continue
        params = unpack_params(arrays, str(said.get("dtype", "")))
        squares = sum(float(np.square(value, dtype=np.float64).sum()) for value in params.values())
        left["norms"][name] = squares**0.5
        left["values"] += sum(value.size for value in params.values())
        left["bytes"] += sum(len(array.data) for array in arrays.values())
    return {**left, "numbers": {} if metrics is None else dict(metrics.items())}
