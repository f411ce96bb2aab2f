"""Counts for Prometheus: those of the files that a server and a site write, on loopback."""

import json
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedllm_flwr.commands import main as cli
from fedllm_flwr.commands.status.exporter import start_metrics
from fedllm_flwr.deployment.audit import AuditLog
from fedllm_flwr.deployment.server_directory import init_server
from processes import free_ports

pytest.importorskip("prometheus_client")


@contextmanager
def scraped(folder: Path) -> Iterator[dict[str, float]]:
    """The samples that a scrape gives, by name and labels."""
    server, thread = start_metrics(folder, 0)
    try:
        assert server.server_address[0] == "127.0.0.1"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{server.server_port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        yield {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
    finally:
        server.shutdown()
        thread.join()


def test_rounds_of_a_server(tmp_path: Path) -> None:
    init_server(tmp_path / "server", ["localhost"], free_ports(5), insecure=True)
    rounds = [
        {"round": 0, "seconds": 0.0, "refused": {"c": "why"}},
        {
            "round": 1,
            "seconds": 2.0,
            "bytes_up": 10,
            "bytes_down": 30,
            "loss": 2.0,
            "clients": {"a": {"loss": 2.0}, "b": {"loss": 2.0}},
            "failures": {},
        },
        {
            "round": 2,
            "seconds": 3.0,
            "bytes_up": 5,
            "bytes_down": 30,
            "loss": 1.5,
            "clients": {"a": {"loss": 1.5}},
            "failures": {"b": "no reply"},
        },
    ]
    output = tmp_path / "server" / "outputs" / "first"
    output.mkdir(parents=True)
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds))

    with scraped(tmp_path / "server") as samples:
        assert samples['fedllm_rounds_total{run="first"}'] == 2
        assert samples['fedllm_replies_total{run="first",site="a"}'] == 2
        assert samples['fedllm_refusals_total{run="first",site="b"}'] == 1
        assert samples['fedllm_refusals_total{run="first",site="c"}'] == 1
        assert samples['fedllm_tensor_bytes_total{direction="received",run="first"}'] == 15
        assert samples['fedllm_tensor_bytes_total{direction="sent",run="first"}'] == 60
        assert samples['fedllm_round_seconds_total{run="first"}'] == 5
        assert samples['fedllm_train_loss{run="first"}'] == 1.5
        assert samples['fedllm_up{process="superlink"}'] == 0


def test_messages_of_a_site(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text("")
    log = AuditLog(tmp_path / "audit")
    for records, size in ((16, 100), (32, 100)):
        log.append(
            {
                "event": "train",
                "run": "7",
                "verdict": "answered",
                "records": records,
                "bytes": size,
                "seconds": 0.5,
            }
        )
    log.append({"event": "query", "run": "7", "verdict": "refused", "seconds": 0.25})

    with scraped(tmp_path) as samples:
        answered = '{event="train",verdict="answered"}'
        assert samples[f"fedllm_site_messages_total{answered}"] == 2
        assert samples[f"fedllm_site_records_total{answered}"] == 48
        assert samples[f"fedllm_site_left_bytes_total{answered}"] == 200
        assert samples[f"fedllm_site_seconds_total{answered}"] == 1
        assert samples['fedllm_site_messages_total{event="query",verdict="refused"}'] == 1
        assert samples["fedllm_site_requests_waiting"] == 0
        assert samples["fedllm_site_audit_unbroken"] == 1


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["metrics", str(tmp_path)]) == 2
    assert "not a directory of `fedllm server init`" in capsys.readouterr().err.replace("\n", " ")
    (tmp_path / "node.toml").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["metrics", str(tmp_path), "--port", str(port)]) == 1
        assert "give a free one" in capsys.readouterr().err.replace("\n", " ")
