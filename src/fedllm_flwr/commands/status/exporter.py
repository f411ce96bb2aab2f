"""``fedllm metrics``: counters of a server or a site for Prometheus, on loopback only.

Each scrape reads the round records of a server's runs or a site's audit log, so a restart loses no
counts.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedllm_flwr.commands.status.federation import is_operators
from fedllm_flwr.commands.status.health import addresses, check_health
from fedllm_flwr.deployment.audit import AuditLog, AuditReport
from fedllm_flwr.deployment.certificates import LOOPBACK
from fedllm_flwr.deployment.flower import is_server
from fedllm_flwr.deployment.site_views import site_requests
from fedllm_flwr.errors import ConfigError, FederationError
from fedllm_flwr.reporting.metrics import read_metrics

_HEALTH_TIMEOUT_S = 1.0

Labels = tuple[str, ...]


def serve_metrics(directory: Path, port: int) -> None:
    """Serve ``http://127.0.0.1:<port>/metrics`` until interrupted.

    Raises:
        ConfigError: the directory is not a server's or a site's, prometheus-client is missing, or
            the port is invalid.
        FederationError: the port is in use.
    """
    server, thread = start_metrics(directory, port)
    print(f"http://{LOOPBACK[1]}:{server.server_port}/metrics", flush=True)
    try:
        thread.join()
    finally:
        server.shutdown()


def start_metrics(directory: Path, port: int) -> tuple[Any, threading.Thread]:
    """The HTTP server and its thread; port 0 chooses a free port. Raises like `serve_metrics`."""
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise ConfigError(
            "fedllm metrics needs prometheus-client: pip install 'fedllm-flwr[metrics]'"
        ) from None
    folder = directory.expanduser().resolve()
    if not is_operators(folder):
        raise ConfigError(
            f"{folder}: not a directory of `fedllm server init` or `fedllm site init`"
        )
    if not 0 <= port < 65_536:
        raise ConfigError(f"--port {port}: give 1 to 65535")
    registry = CollectorRegistry()
    registry.register(ServerMetrics(folder) if is_server(folder) else SiteMetrics(folder))
    try:
        server, thread = start_http_server(port, LOOPBACK[1], registry)
    except OSError as error:
        raise FederationError(f"--port {port}: {error.strerror}; give a free one") from error
    return server, thread


class ServerMetrics:
    """Rounds, replies, refusals, bytes and seconds of all runs in ``outputs/``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Any]:
        """Metric families from the current files."""
        rounds, replies, refusals, moved, seconds = (Counter[Labels]() for _ in range(5))
        losses: dict[Labels, float] = {}
        for file in sorted(self._folder.glob("outputs/*/metrics.jsonl")):
            run = file.parent.name
            for record in read_metrics(file):
                for site in record.get("refused", {}):
                    refusals[run, site] += 1
                if record["round"] == 0:
                    continue
                rounds[(run,)] += not record.get("failed", False)
                for site in record.get("clients", {}):
                    replies[run, site] += 1
                for site in record.get("failures", {}):
                    refusals[run, site] += 1
                moved[run, "received"] += record.get("bytes_up", 0)
                moved[run, "sent"] += record.get("bytes_down", 0)
                seconds[(run,)] += record.get("seconds", 0.0)
                if record.get("loss") is not None:
                    losses[(run,)] = record["loss"]
        run_and_site = ("run", "site")
        yield _counter("fedllm_rounds", "Finished rounds", ("run",), rounds)
        yield _counter("fedllm_replies", "Usable replies", run_and_site, replies)
        yield _counter("fedllm_refusals", "Missing or refused replies", run_and_site, refusals)
        yield _counter(
            "fedllm_tensor_bytes", "Bytes of transferred tensors", ("run", "direction"), moved
        )
        yield _counter("fedllm_round_seconds", "Seconds in rounds", ("run",), seconds)
        yield _gauge("fedllm_train_loss", "Training loss of the last round", ("run",), losses)
        yield _up(self._folder)


class SiteMetrics:
    """Entries of a site's audit log, and requests that wait for approval."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = AuditLog(folder / "audit")
        self._read: tuple[object, AuditReport] | None = None

    def collect(self) -> Iterator[Any]:
        """Metric families; the log is read again only if it has grown."""
        state = [(file.name, file.stat().st_size) for file in self._log.files()]
        if self._read is None or self._read[0] != state:
            self._read = (state, self._log.read())
        report = self._read[1]
        messages: Counter[Labels] = Counter()
        sums: dict[str, Counter[Labels]] = {
            name: Counter() for name in ("records", "bytes", "seconds")
        }
        for entry in report.entries:
            labels = (str(entry.get("event", "")), str(entry.get("verdict", "")))
            messages[labels] += 1
            for name, sum_ in sums.items():
                sum_[labels] += entry.get(name, 0)
        by = ("event", "verdict")
        yield _counter("fedllm_site_messages", "Messages of servers", by, messages)
        yield _counter("fedllm_site_records", "Records used, by message", by, sums["records"])
        yield _counter("fedllm_site_left_bytes", "Bytes of tensors sent", by, sums["bytes"])
        yield _counter("fedllm_site_seconds", "Seconds of work", by, sums["seconds"])
        waiting = sum(request.is_waiting for request in site_requests(self._folder).all())
        text = "Runs that wait for approval"
        yield _gauge("fedllm_site_requests_waiting", text, (), {(): waiting})
        text = "1 if the audit log's chain is intact"
        yield _gauge("fedllm_site_audit_unbroken", text, (), {(): float(not report.problems)})
        yield _up(self._folder)


def _up(folder: Path) -> Any:
    """Health checks of the directory's processes."""
    states: dict[Labels, float] = {
        (part,): float(not check_health(part, address, _HEALTH_TIMEOUT_S).problem)
        for part, address in addresses(folder).items()
    }
    return _gauge("fedllm_up", "1 if the process serves", ("process",), states)


def _counter(name: str, text: str, labels: Labels, values: Mapping[Labels, float]) -> Any:
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(name, text, labels=labels), values)


def _gauge(name: str, text: str, labels: Labels, values: Mapping[Labels, float]) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(name, text, labels=labels), values)


def _filled(family: Any, values: Mapping[Labels, float]) -> Any:
    for labels, value in sorted(values.items()):
        family.add_metric(labels, value)
    return family
