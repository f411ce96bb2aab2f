"""The start scripts keep their processes running, whatever ends them, with bounded pauses."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedllm_flwr.data.sources import DEMO
from fedllm_flwr.deployment.server_directory import init_server
from fedllm_flwr.deployment.site_directory import SiteOptions, init_site

# In the place of Flower's program: notes each start, and ends with the next of the statuses.
ENDING = """#!/bin/sh
echo start >> {log}
number=$(wc -l < {log})
status=$(echo {statuses} | cut -d ' ' -f "$number")
[ "$status" = stay ] && exec sleep 60
exit "$status"
"""
QUICK = {"RESTART_S": "1", "RESTART_MAX_S": "2"}


def ending(program: Path, log: Path, statuses: str) -> None:
    program.write_text(ENDING.format(log=log, statuses=statuses))
    program.chmod(0o755)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Its script starts the program ``supernode`` of its directory in the place of `site start`."""
    data = str(DEMO / "train.jsonl")
    init_site(tmp_path / "site", SiteOptions("a", data, "localhost:9092", insecure=True))
    script = tmp_path / "site" / "start-supernode.sh"
    text, count = re.subn(
        r"^  \S+ site start .*&$", "  ./supernode &", script.read_text(), flags=re.M
    )
    assert count == 1
    script.write_text(text)
    return tmp_path / "site"


@pytest.fixture
def server(tmp_path: Path) -> Path:
    init_server(tmp_path / "server", ["localhost"], 9191, insecure=True)
    return tmp_path / "server"


def ended(
    script: Path, more: Mapping[str, str]
) -> "tuple[subprocess.CompletedProcess[str], float]":
    """Outcome and seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [str(script)],
        env={**os.environ, **QUICK, **more},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done, time.monotonic() - began


def test_site_is_started_again_whatever_its_status(site: Path, tmp_path: Path) -> None:
    """A SuperNode ends with 0 when its server has failed (flwr 1.31)."""
    log = tmp_path / "log"
    ending(site / "supernode", log, "0 1 0")
    done, seconds = ended(site / "start-supernode.sh", {"RESTARTS": "2"})

    assert log.read_text().count("start") == 3
    assert "ended with status 0, starting it again in 1 s (1 in a row)" in done.stderr
    assert "ended with status 1, starting it again in 2 s (2 in a row)" in done.stderr
    assert done.returncode == 1  # 0 would tell a supervisor that all is well
    assert 3 <= seconds < 20


@pytest.mark.slow
def test_pauses_are_bounded(site: Path, tmp_path: Path) -> None:
    ending(site / "supernode", tmp_path / "log", "7 7 7 7 7")
    done, _ = ended(site / "start-supernode.sh", {"RESTARTS": "4", "RESTART_MAX_S": "1"})
    assert done.stderr.count("starting it again in 1 s") == 4
    assert done.returncode == 7


def test_ending_the_script_ends_the_site(site: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    ending(site / "supernode", log, "0 stay")
    with subprocess.Popen(
        [str(site / "start-supernode.sh")], env={**os.environ, **QUICK}
    ) as script:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (
            not log.exists() or log.read_text().count("start") < 2
        ):
            time.sleep(0.05)
        script.send_signal(signal.SIGTERM)
        assert script.wait(20) == 0
    assert log.read_text().count("start") == 2


def test_both_parts_of_the_server_are_started_again(server: Path, tmp_path: Path) -> None:
    ending(server / "start-superlink.sh", tmp_path / "superlink", "0 137 1")
    ending(server / "start-superexec.sh", tmp_path / "superexec", "0 0 0 0 0 0")
    done, _ = ended(server / "start.sh", {"RESTARTS": "2", "RESTART_MAX_S": "1"})

    assert (tmp_path / "superlink").read_text().count("start") == 3
    assert (tmp_path / "superexec").read_text().count("start") >= 2
    assert "the SuperLink ended with status 0, starting it again in 1 s (1 in a row)" in done.stderr
    assert "the SuperLink ended with status 137, starting it again in 1 s" in done.stderr
    assert "the SuperExec ended with status 0, starting it again" in done.stderr
    assert done.returncode == 1
