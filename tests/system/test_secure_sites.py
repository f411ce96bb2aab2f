"""Secure aggregation over TLS: a site is killed between the exchanges, and then the server."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deployments import Federation, command_of, rounds_of, running_federation
from fedllm_flwr.federation.state import load_state
from processes import relatives, started, wait_for

pytestmark = pytest.mark.slow

SITES = ("ant", "bees", "crane")
RUN = [
    *("privacy.secure_aggregation=true", "algorithm=scaffold", "data=jsonl"),
    *("data.path=at-the-sites", "federation.engine=deployment", "federation.num_clients=3"),
    *("data.columns.label=output", "federation.sample_fraction=1.0", "federation.num_rounds=3"),
    *("training.max_steps=2", "training.batch_size=4", "evaluation.central=false"),
]


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    with running_federation(tmp_path, dict.fromkeys(SITES)) as running:
        assert wait_for(lambda: running.nodes() == ["online"] * 3, 120)
        yield running


def answered(root: Path, name: str, event: str) -> int:
    """Number of answers of a kind that have left a site, as its audit log says."""
    lines = [
        json.loads(line)
        for log in sorted((root / name / "audit").glob("*.jsonl"))
        for line in log.read_text().splitlines()
    ]
    return sum(line.get("event") == event and line.get("verdict") == "answered" for line in lines)


def processes_of(root: Path, name: str) -> list[psutil.Process]:
    """Those of a site: its start script, SuperNode, app and trainer."""
    found = []
    for process in relatives(root):
        try:
            if f"{root / name}" in f"{command_of(process)} {process.cwd()}":
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def bits(output: Path) -> dict[str, bytes]:
    """The adapter and SCAFFOLD's c after the last round."""
    state = load_state(output / "checkpoints")[0]
    assert state.round == 3
    groups = {"w": state.params, "c": state.tensors["control"]}
    return {f"{g} {n}": value.tobytes() for g, some in groups.items() for n, value in some.items()}


def test_a_site_and_the_server_die_between_the_exchanges(federation: Federation) -> None:
    """The round is done again under new masks; the run ends in the bits of one without faults."""
    root = federation.folder.parent
    whole, output = root / "whole", root / "run"
    assert federation.submit([*RUN, f"output_dir={whole}"]).returncode == 0
    assert wait_for(lambda: (whole / "summary.json").exists(), 900), rounds_of(whole)

    assert federation.submit([*RUN, f"output_dir={output}"]).returncode == 0
    assert wait_for(lambda: len(rounds_of(output)) >= 2, 600), rounds_of(output)
    # Round 2: a trainer stands still until another site's update has left, and the site is gone.
    [late] = [p for p in processes_of(root, "crane") if "client.resident" in command_of(p)]
    late.suspend()
    assert wait_for(lambda: answered(root, "ant", "train") >= 5, 300)
    time.sleep(5)  # until the reply is with the server
    for process in processes_of(root, "ant"):
        process.kill()
    signed = answered(root, "bees", "sign")
    late.resume()
    # The second exchange has begun, and waits for the site that is gone.
    assert wait_for(lambda: answered(root, "bees", "sign") > signed, 300)
    for process in relatives(root):
        if "flwr-serverapp" in command_of(process):
            process.kill()
    assert len(rounds_of(output)) == 2
    with started([str(root / "ant" / "start-supernode.sh")], root):
        assert wait_for(lambda: federation.nodes().count("online") == 3, 200)
        assert federation.submit([f"resume={output}"]).returncode == 0
        assert wait_for(lambda: (output / "summary.json").exists(), 900), rounds_of(output)
    assert bits(output) == bits(whole)
