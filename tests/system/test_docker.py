"""A federation in containers: the image, TLS, parts that die and come back, the adapter."""

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr import __version__
from processes import wait_for

DOCKER = Path(__file__).parents[2] / "docker"
IMAGE = f"fedllm-flwr:{__version__}"
SITES = ["site-a", "site-b", "site-c"]
START_S, RUN_S = 600.0, 900.0
ROUNDS = 16  # a registered site is let in again when its old connection has expired: a minute


def _answers(*command: str) -> bool:
    """Whether a command of Docker is there and succeeds."""
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


@pytest.fixture(scope="module")
def image() -> str:
    """The image of this version, built if there is none; build it anew after a change."""
    for command in (("docker", "info"), ("docker", "compose", "version")):
        if not _answers(*command):
            pytest.skip(f"`{' '.join(command)}` does not answer")
    if not _answers("docker", "image", "inspect", IMAGE):
        file = str(DOCKER / "Dockerfile")
        subprocess.run(["docker", "build", "-f", file, "-t", IMAGE, str(DOCKER.parent)], check=True)
    return IMAGE


@dataclass(frozen=True)
class Project:
    """A Compose project of this test's own."""

    name: str
    files: tuple[str, ...]

    def start(self, *command: str) -> "subprocess.Popen[str]":
        files = [part for file in self.files for part in ("-f", str(DOCKER / file))]
        return subprocess.Popen(
            ["docker", "compose", "-p", self.name, *files, *command],
            env={**os.environ, "FLEET_PORT": "0", "SITE_MEMORY": "2g", "SERVER_MEMORY": "2g"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str) -> str:
        """What a command says; it must succeed."""
        process = self.start(*command)
        said, _ = process.communicate(timeout=RUN_S)
        assert process.returncode == 0, said
        return said

    def crash(self, service: str) -> None:
        """SIGKILL to all processes of a container but its init, which then ends with 137."""
        self.start("exec", "-T", service, "sh", "-c", "kill -9 -1").communicate(timeout=60)

    def inspect(self, service: str) -> dict[str, Any]:
        [container] = json.loads(self.run_docker("inspect", f"{self.name}-{service}-1"))
        return {"restarts": container["RestartCount"], "health": container["State"]["Health"]}

    @staticmethod
    def run_docker(*command: str) -> str:
        return subprocess.run(
            ["docker", *command], capture_output=True, text=True, timeout=60, check=True
        ).stdout

    def rounds(self) -> list[dict[str, Any]]:
        """What the run has recorded so far; a look takes two seconds, as it is asked for often."""
        time.sleep(2)
        container, file = f"{self.name}-superexec-1", "/server/outputs/run/metrics.jsonl"
        command = ["docker", "exec", container, "cat", file]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(params=["insecure", "tls"])
def project(request: pytest.FixtureRequest, image: str) -> Iterator[Project]:
    files = ("compose.yaml", *(["compose.tls.yaml"] if request.param == "tls" else []))
    made = Project(f"fedllm-test-{request.param}-{os.getpid()}", files)
    try:
        yield made
    finally:
        made.run("down", "--volumes", "--timeout", "5")


@pytest.mark.docker
def test_run_survives_crashes_and_leaves_an_adapter(project: Project, tmp_path: Path) -> None:
    """A site dies in the middle of a round, the SuperLink once it is back; it comes back, too."""
    options = ["training.max_steps=1", "evaluation.every=0", "output_dir=/server/outputs/run"]
    train = project.start("run", "--rm", "-T", "train", f"federation.num_rounds={ROUNDS}", *options)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(train.stdout or []))
    reader.start()
    try:
        assert wait_for(lambda: len(project.rounds()) >= 2, START_S), said
        project.crash("site-b")
        assert wait_for(lambda: _has_come_back("site-b", project.rounds()), RUN_S), said
        project.crash("superlink")
        train.wait(timeout=RUN_S)
    finally:
        train.kill()
        reader.join()

    assert train.returncode == 0, "".join(said)
    rounds = project.rounds()
    assert [record["round"] for record in rounds] == list(range(ROUNDS + 1))
    assert sorted(rounds[-1]["clients"]) == SITES
    for service in ("site-b", "superlink"):
        assert project.inspect(service)["restarts"] >= 1
    assert project.inspect("site-a")["restarts"] == 0
    project.run("cp", "superexec:/server/outputs/run/adapter", str(tmp_path))
    _check_adapter(tmp_path / "adapter")


def _has_come_back(site: str, rounds: list[dict[str, Any]]) -> bool:
    """Whether a site takes part that was missing in an earlier round."""
    present = [site in record["clients"] for record in rounds[1:]]
    return False in present and present[-1]


def _check_adapter(adapter: Path) -> None:
    """PEFT loads it, and it changes the base model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from fedllm_flwr.models.tokenizer import EMBEDDED

    base = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        before = base(tokens).logits
        after = PeftModel.from_pretrained(base, str(adapter))(tokens).logits
    assert not torch.allclose(before, after)


@pytest.mark.docker
def test_sites_reach_one_port_of_the_server(project: Project) -> None:
    project.run("up", "-d", "--wait", "superlink", "site-a")
    probe = (
        "import socket\n"
        "for port in (9091, 9092, 9093, 9094):\n"
        "    with socket.socket() as s:\n"
        "        print(port, s.connect_ex(('superlink', port)))"
    )

    said = project.run("exec", "-T", "site-a", "python", "-c", probe)
    answers = dict(line.split() for line in said.splitlines())
    assert [port for port, error in answers.items() if error == "0"] == ["9092"]
    assert len(answers) == 4
    assert project.run("exec", "-T", "site-a", "id", "-u").strip() == "10001"
