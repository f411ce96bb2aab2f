"""How a site's SuperNode is started: guarded, or not at all."""

import stat
from pathlib import Path

import pytest

from fedllm_flwr.deployment.server_directory import init_server
from fedllm_flwr.deployment.site_directory import SiteOptions, init_site
from fedllm_flwr.deployment.starting import supernode_command
from fedllm_flwr.errors import ConfigError


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site without encryption, whose path has a blank."""
    data = tmp_path / "notes.jsonl"
    data.write_text('{"instruction": "Why?", "output": "Because."}\n')
    folder = tmp_path / "a site"
    init_site(folder, SiteOptions("a", str(data), "fl.org:9092", insecure=True, health_port=9333))
    return folder


def test_the_guards_programs_come_first(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/opt/mine")
    command, environment = supernode_command(site, ["--max-wait-time", "9"])

    assert environment["PATH"].split(":")[0] == str(site / "bin")
    assert environment["PATH"].endswith(":/opt/mine")
    assert environment["FLWR_HOME"] == str(site / "flwr")
    assert command[2:5] == ["-m", "fedllm_flwr.deployment.programs", "flower-supernode"]
    said = " ".join(command[1:])
    assert "--superlink fl.org:9092 --health-server-address 127.0.0.1:9333 --insecure" in said
    assert "--clientappio-api-address 127.0.0.1:0" in said
    assert said.endswith("--max-wait-time 9")


@pytest.mark.parametrize("program", ["flwr-clientapp", "flower-superexec"])
@pytest.mark.parametrize("change", ["gone", "not executable", "another"])
def test_without_its_programs_a_site_does_not_start(site: Path, program: str, change: str) -> None:
    """Flower's own program of the name would be found on the path, and run what a server sends."""
    file = site / "bin" / program
    if change == "gone":
        file.unlink()
    elif change == "not executable":
        file.chmod(0o644)
    else:
        file.write_text(f'#!/bin/sh\nexec {program} "$@"\n')

    with pytest.raises(ConfigError, match=f"{program}: not the program that keeps a server's code"):
        supernode_command(site)


def test_what_is_no_site_is_not_started(site: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no directory that `fedllm site init` has made"):
        supernode_command(tmp_path)
    (site / "supernode.toml").write_text('superlink = "a:1"\nnode-config = "x"\n')
    with pytest.raises(ConfigError, match="unknown node-config"):
        supernode_command(site)
    (site / "supernode.toml").write_text("insecure = true\n")
    with pytest.raises(ConfigError, match="superlink is missing"):
        supernode_command(site)


def test_no_readme_shows_another_way(site: Path) -> None:
    """Flower's own command would run code of a bundle."""
    readme = (site / "README.md").read_text()
    templates = Path(init_site.__code__.co_filename).parent / "templates"
    commands = [
        line
        for text in (readme, *(file.read_text() for file in templates.glob("*.md")))
        for line in text.splitlines()
        if line.strip().startswith("flower-supernode")
    ]
    assert commands == []
    assert f"    fedllm site start '{site}'" in readme
    assert "fedllm site start" in (templates / "server.md").read_text()
    assert 'site start "$PWD"' in (site / "start-supernode.sh").read_text()


def test_other_users_cannot_enter_a_sites_directory(tmp_path: Path) -> None:
    """Key, state, requests and audit log lie below it."""
    data, server = tmp_path / "notes.jsonl", tmp_path / "server"
    data.write_text('{"instruction": "Why?", "output": "Because."}\n')
    init_server(server, ["fl.org"])
    folder = tmp_path / "site"
    init_site(folder, SiteOptions("a", str(data), "fl.org:9092", str(server / "ca.crt")))

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "a.key").stat().st_mode) == 0o600
    open_to_all = [
        file for file in folder.rglob("*") if file.is_dir() and file.stat().st_mode & 0o77
    ]
    assert open_to_all == []
