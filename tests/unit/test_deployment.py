"""Directories of operators: certificates, keys, scripts, permissions, and every refusal."""

import json
import re
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)
from flwr.common.config import parse_config_args

from fedllm_flwr.commands import main as cli
from fedllm_flwr.config.schema import ColumnsConfig
from fedllm_flwr.deployment import new_directory as directories
from fedllm_flwr.deployment.certificates import issue_ca
from fedllm_flwr.deployment.flower import flwr_environment
from fedllm_flwr.deployment.node import site_columns, to_toml
from fedllm_flwr.deployment.server_directory import init_server
from fedllm_flwr.deployment.site_directory import SiteOptions, init_site
from fedllm_flwr.deployment.site_keys import (
    check_public_key,
    make_key_pair,
    register_site,
    registered_keys,
    registered_sites,
)
from fedllm_flwr.deployment.starting import supernode_command
from fedllm_flwr.errors import ConfigError, DataError, FederationError

HOSTS = ["fl.example.org", "10.0.0.5", "2001:db8::1"]
Options = Callable[..., SiteOptions]


@pytest.fixture
def server(tmp_path: Path) -> Path:
    init_server(tmp_path / "server", HOSTS, 9191)
    return tmp_path / "server"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    file = tmp_path / "notes.jsonl"
    file.write_text('{"question": "Why?", "output": "Because."}\n' * 3)
    return file


@pytest.fixture
def options(server: Path, notes: Path) -> Options:
    def make(**changes: object) -> SiteOptions:
        values: dict[str, object] = {
            "name": "hospital-a",
            "data": str(notes),
            "server": "fl.example.org:9192",
            "ca": str(server / "ca.crt"),
            "columns": ["instruction=question"],
        }
        return SiteOptions(**{**values, **changes})  # type: ignore[arg-type]

    return make


def certificate(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def modes(folder: Path) -> dict[str, int]:
    files = [folder, *folder.rglob("*")]
    return {str(f.relative_to(folder)): stat.S_IMODE(f.stat().st_mode) for f in files}


def test_server_certificate_is_for_all_hosts_and_loopback(server: Path) -> None:
    names = certificate(server / "server.crt").extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )

    assert names.value.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    addresses = [str(ip) for ip in names.value.get_values_for_type(x509.IPAddress)]
    assert addresses == ["10.0.0.5", "2001:db8::1", "127.0.0.1"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl checks the certificates")
def test_openssl_verifies_certificate_and_makes_a_new_one_as_the_readme_says(server: Path) -> None:
    def verified(host: str) -> "subprocess.CompletedProcess[str]":
        command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile"]
        return run(*command, "ca.crt", "-verify_hostname", host, "server.crt")

    def run(*command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, cwd=server, capture_output=True, text=True, check=False)

    assert verified("fl.example.org").returncode == 0, verified("fl.example.org").stderr
    assert verified("localhost").returncode == 0
    assert verified("fl.example.com").returncode != 0

    before, readme = certificate(server / "server.crt"), (server / "README.md").read_text()
    authority, renewal = re.findall(r"```sh\n(openssl .*?)```", readme, re.DOTALL)
    for commands in (renewal, authority + renewal):  # of the same authority, and all anew
        done = run("sh", "-ec", commands)
        assert done.returncode == 0, done.stderr
        after = certificate(server / "server.crt")
        assert after.serial_number != before.serial_number
        assert verified("fl.example.org").returncode == 0, verified("fl.example.org").stderr
        names = x509.SubjectAlternativeName
        assert set(after.extensions.get_extension_for_class(names).value) == set(
            before.extensions.get_extension_for_class(names).value
        )


def test_private_host_is_where_app_and_commands_find_the_server(tmp_path: Path) -> None:
    """Containers: the SuperLink's two private ports are on a network of their own."""
    init_server(tmp_path / "server", ["fl.example.org"], 9191, private_host="control")
    folder = tmp_path / "server"

    names = certificate(folder / "server.crt").extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert "control" in names.value.get_values_for_type(x509.DNSName)
    superlink = (folder / "start-superlink.sh").read_text()
    assert "--serverappio-api-address control:9191" in superlink
    assert "--control-api-address control:9193" in superlink
    assert "--fleet-api-address 0.0.0.0:9192" in superlink
    superexec = (folder / "start-superexec.sh").read_text()
    assert "--appio-api-address control:9191" in superexec
    assert 'no_proxy="control,localhost,127.0.0.1' in superexec
    connection = tomllib.loads((folder / "flwr" / "config.toml").read_text())["superlink"]
    assert connection["federation"]["address"] == "control:9193"
    assert flwr_environment(folder)["no_proxy"].split(",")[0] == "control"


def test_validity_is_as_stated(tmp_path: Path) -> None:
    lines = init_server(tmp_path / "server", ["localhost"])

    for file, days in (("ca.crt", 3650), ("server.crt", 730)):
        found = certificate(tmp_path / "server" / file)
        assert (found.not_valid_after_utc - found.not_valid_before_utc).days == days
        assert f"{days} days" in lines[0]


def test_server_keeps_secrets_to_its_owner(server: Path) -> None:
    found = modes(server)

    assert {name for name, mode in found.items() if mode == 0o600} == {
        "ca.key",
        "server.key",
        "superexec.secret",
    }
    assert found["."] == 0o700
    assert {name for name, mode in found.items() if mode & 0o111 and name.endswith(".sh")} == {
        "start.sh",
        "start-superlink.sh",
        "start-superexec.sh",
    }
    for file in (server / "ca.key", server / "server.key"):
        assert b"PRIVATE KEY" in file.read_bytes()


def test_superlink_shows_the_network_its_fleet_api_only(server: Path) -> None:
    script = (server / "start-superlink.sh").read_text()

    assert "--serverappio-api-address 127.0.0.1:9191" in script
    assert "--fleet-api-address [::]:9192" in script  # a host is given by its IPv6 address
    assert "--control-api-address 127.0.0.1:9193" in script
    assert "--enable-supernode-auth" in script
    assert "--insecure" not in script
    assert "127.0.0.1:9191" in (server / "start-superexec.sh").read_text()


def test_flower_reads_the_connection(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.cli.flower_config import read_superlink_connection

    monkeypatch.setenv("FLWR_HOME", str(server / "flwr"))
    for name in ("federation", None):
        connection = read_superlink_connection(name)
        assert connection.address == "127.0.0.1:9193"
        assert connection.root_certificates == str(server / "ca.crt")
        assert not connection.insecure


def test_insecure_server_says_so_and_holds_no_keys(tmp_path: Path) -> None:
    lines = init_server(tmp_path / "server", ["localhost"], insecure=True)

    assert "WITHOUT encryption and authentication" in lines[0]
    assert not list((tmp_path / "server").glob("*.key"))
    script = (tmp_path / "server" / "start-superlink.sh").read_text()
    assert "--insecure" in script
    assert "--enable-supernode-auth" not in script


@pytest.mark.parametrize(
    "host", ["http://fl.org", "fl.org:9092", "10.0.0.300", "a b", "", "-a", "[::1]", "é.fr"]
)
def test_host_that_no_one_can_dial_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="neither a host name nor an IP address"):
        init_server(tmp_path / "server", ["localhost", host])
    assert not (tmp_path / "server").exists()


@pytest.mark.parametrize("port", [0, -1, 65_534])
def test_port_out_of_range_is_refused(tmp_path: Path, port: int) -> None:
    with pytest.raises(ConfigError, match=f"--port-base {port}"):
        init_server(tmp_path / "server", ["localhost"], port)


def test_nothing_is_written_over_what_is_there(server: Path, options: Options) -> None:
    before = {file: file.read_bytes() for file in server.rglob("*") if file.is_file()}

    with pytest.raises(ConfigError, match="not empty"):
        init_server(server, ["localhost"])
    with pytest.raises(ConfigError, match="not empty"):
        init_site(server, options())
    with pytest.raises(ConfigError, match="not a directory"):
        init_server(server / "ca.key", ["localhost"])
    assert {file: file.read_bytes() for file in server.rglob("*") if file.is_file()} == before


def test_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    init_server(tmp_path / "mine", ["localhost"])

    assert (tmp_path / "mine" / "ca.crt").is_file()
    assert modes(tmp_path / "mine")["."] == 0o700


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    one = directories.NewFile("text")
    files = {"a": one, "folder/b": one, "a/c": one}  # a is no folder

    with pytest.raises(ConfigError, match="cannot be written"):
        directories.write_new(tmp_path / "new", files)
    assert list(tmp_path.iterdir()) == []


def test_flower_accepts_the_site_key(tmp_path: Path, options: Options) -> None:
    init_site(tmp_path / "site", options())
    # As flower-supernode and flwr supernode register read them.
    private = load_ssh_private_key((tmp_path / "site/hospital-a.key").read_bytes(), None)
    public = load_ssh_public_key((tmp_path / "site/hospital-a.pub").read_bytes())

    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(private.curve, ec.SECP384R1)
    assert private.public_key() == public
    assert modes(tmp_path / "site")["hospital-a.key"] == 0o600
    assert modes(tmp_path / "site")["."] == 0o700


def test_flower_reads_the_node_config(tmp_path: Path, options: Options, toy_model: Path) -> None:
    odd = tmp_path / 'no"tes #1.jsonl'
    odd.write_text('{"the question": "Why?", "output": "Because."}\n')
    columns = ["instruction=the question"]
    init_site(
        tmp_path / "site",
        options(data=str(odd), columns=columns, model_path=str(toy_model), device="cpu"),
    )
    read = parse_config_args([str(tmp_path / "site" / "node.toml")])

    roles = {key: value for key, value in read.items() if key.startswith("columns.")}
    assert {key: value for key, value in read.items() if key not in roles} == {
        "client-name": "hospital-a",
        "data-path": str(odd),
        "preprocessing": "none",
        "model-path": str(toy_model),
        "device": "cpu",
        "state-dir": str(tmp_path / "site" / "state"),
        "policy-path": str(tmp_path / "site" / "policy.yaml"),
        "site-dir": str(tmp_path / "site"),
        "server-address": "fl.example.org:9192",
    }
    assert site_columns(read) == ColumnsConfig(instruction="the question")


SYSTEMD = shutil.which("systemd-analyze")


@pytest.mark.skipif(SYSTEMD is None, reason="systemd-analyze reads the units")
@pytest.mark.parametrize("name", ["plain", 'o"dd $HOME 100% é'])
def test_units_are_hardened(name: str, tmp_path: Path, notes: Path) -> None:
    """Exposure below 3 of 10 ("OK"), and no line that systemd does not understand."""
    init_server(tmp_path / name / "server", ["localhost"], 9191, insecure=True)
    site = SiteOptions(
        "ward", str(notes), "localhost:9192", columns=["instruction=question"], insecure=True
    )
    init_site(tmp_path / name / "site", site)
    units = sorted((tmp_path / name).glob("*/systemd/*.service"))
    assert [unit.stem for unit in units] == [
        "fedllm-superexec",
        "fedllm-superlink",
        "fedllm-supernode",
    ]

    for unit in units:
        command = [str(SYSTEMD), "security", "--offline=true", "--threshold=30", str(unit)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Overall exposure level" in done.stdout
        command = [str(SYSTEMD), "verify", str(unit)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        folder = str(unit.parents[1]).replace('"', '\\"').replace("%", "%%")
        assert f'ReadWritePaths="{folder}"\n' in unit.read_text()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen and openssl compare")
def test_fingerprints_are_those_of_openssl_and_ssh_keygen(
    server: Path, tmp_path: Path, options: Options
) -> None:
    said = " ".join(init_site(tmp_path / "site", options()))
    read = ["openssl", "x509", "-in", str(server / "ca.crt"), "-noout", "-fingerprint", "-sha256"]
    expected = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    assert expected.strip().partition("=")[2] in said
    read = ["ssh-keygen", "-l", "-f", str(tmp_path / "site" / "hospital-a.pub")]
    expected = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    assert expected.split()[1] in said


def test_node_config_holds_any_text() -> None:
    odd = 'a "b" \\ \t \x7f é ☃ = #'
    assert tomllib.loads(to_toml({"key": odd})) == {"key": odd}


def test_site_columns_of_a_plain_node_config() -> None:
    """A node that was started by hand: roles that it does not name have the package's defaults."""
    assert site_columns({"client-name": "a"}) == ColumnsConfig()
    assert site_columns({"columns.input": "context"}) == ColumnsConfig(input="context")
    with pytest.raises(ConfigError, match=r"unknown columns\.inptu"):
        site_columns({"columns.inptu": "context"})


def test_site_starts_with_tls_and_its_key(tmp_path: Path, server: Path, options: Options) -> None:
    init_site(tmp_path / "site", options())
    script = " ".join(supernode_command(tmp_path / "site")[0])

    assert "--superlink fl.example.org:9192" in script
    assert "--root-certificates ca.crt --auth-supernode-private-key hospital-a.key" in script
    assert "--clientappio-api-address 127.0.0.1:" in script
    assert "--max-retries" in script
    assert "--insecure" not in script
    assert (tmp_path / "site/ca.crt").read_bytes() == (server / "ca.crt").read_bytes()


def test_insecure_site_says_so_and_has_no_keys(tmp_path: Path, options: Options) -> None:
    lines = init_site(tmp_path / "site", options(insecure=True, ca=None))

    assert any("WARNING" in line and "encrypted" in line for line in lines)
    assert not list((tmp_path / "site").glob("*.key"))
    assert "--insecure" in supernode_command(tmp_path / "site")[0]


def test_usable_records_are_counted_and_decide_the_tasks(tmp_path: Path, options: Options) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [("Hi", "Hello.", "No."), ("Hi", "Same.", "Same."), ("Bye", "See you.", "Go.")]
    names = ("prompt", "chosen", "rejected")
    pairs.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))

    assert "3 of 3 records" in init_site(tmp_path / "site", options())[0]
    lines = init_site(tmp_path / "pairs", options(data=str(pairs), columns=[]))
    assert f"2 of 3 records of {pairs} are usable for task=dpo" in lines[0]
    assert "tasks: [sft]" in (tmp_path / "site" / "policy.yaml").read_text()
    assert "tasks: [dpo, kto]" in (tmp_path / "pairs" / "policy.yaml").read_text()


REFUSED = {
    "name": ({"name": "a b"}, "--name a b: use letters"),
    "name that is a path": ({"name": "../a"}, "--name ../a: use letters"),
    "server without port": ({"server": "fl.example.org"}, "give host:port"),
    "server as URL": ({"server": "https://fl.org:9092"}, "give host:port"),
    "server with shell": ({"server": "fl.org;reboot:9092"}, "give host:port"),
    "no authority": ({"ca": None}, "--ca is missing"),
    "authority not there": ({"ca": "nowhere.crt"}, "--ca nowhere.crt: No such file"),
    "both": ({"insecure": True}, "--insecure and --ca exclude each other"),
    "column": ({"columns": ["instruction"]}, "write role=column"),
    "role": ({"columns": ["instuction=question"]}, "Did you mean 'instruction'?"),
    "role twice": ({"columns": ["input=a", "input=b"]}, "input is given twice"),
    "device": ({"device": "gpu"}, "--device gpu"),
    "model": ({"model_path": "nowhere"}, "no config.json there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_option_leaves_nothing(tmp_path: Path, options: Options, case: str) -> None:
    changes, message = REFUSED[case]

    with pytest.raises(ConfigError, match=re.escape(message)):
        init_site(tmp_path / "site", options(**changes))
    assert not (tmp_path / "site").exists()


def test_wrong_data_leaves_nothing(tmp_path: Path, options: Options) -> None:
    missing, broken = tmp_path / "missing.jsonl", tmp_path / "broken.jsonl"
    broken.write_text('{"question": "Why?", "output": "Because."}\n{"question": \n')
    cases = [
        (options(data=str(missing)), r"--data .*missing\.jsonl: no such file"),
        (options(data=str(broken)), r"broken\.jsonl, line 2: not valid JSON"),
        (options(columns=[]), r"--column instruction=\.\.\."),
    ]
    for given, message in cases:
        with pytest.raises(DataError, match=message):
            init_site(tmp_path / "site", given)
        assert not (tmp_path / "site").exists()


def test_authority_is_checked(tmp_path: Path, server: Path, options: Options) -> None:
    for file, message in (("server.crt", "not that of an authority"), ("ca.key", "no PEM")):
        with pytest.raises(ConfigError, match=message):
            init_site(tmp_path / "site", options(ca=str(server / file)))


def test_private_or_foreign_keys_are_not_registered(tmp_path: Path, server: Path) -> None:
    private, _ = make_key_pair("a")
    sec1 = issue_ca().key.private_bytes(
        Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()
    )
    for content in (private, sec1):
        with pytest.raises(ConfigError, match="a private key, which stays at its site"):
            check_public_key(content, "a")
    ed25519 = b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE"
    for content in (ed25519, b"", (server / "ca.crt").read_bytes()):
        with pytest.raises(ConfigError, match="no ECDSA public key"):
            check_public_key(content, "a")


@pytest.mark.slow
def test_registration_without_a_superlink_keeps_no_key(tmp_path: Path, server: Path) -> None:
    (tmp_path / "a.pub").write_bytes(make_key_pair("a")[1])

    with pytest.raises(FederationError, match=r"does not answer; start .*start\.sh first"):
        register_site(server, tmp_path / "a.pub")
    assert not (server / "site-keys" / "a.pub").exists()


def test_key_of_a_name_that_is_taken_is_refused(tmp_path: Path, server: Path) -> None:
    (server / "site-keys" / "a.pub").write_bytes(make_key_pair("a")[1])
    (tmp_path / "a.pub").write_bytes(make_key_pair("a")[1])

    with pytest.raises(ConfigError, match="holds another key of this name"):
        register_site(server, tmp_path / "a.pub")
    with pytest.raises(ConfigError, match="no directory that `fedllm server init` has made"):
        register_site(tmp_path, tmp_path / "a.pub")


def test_name_that_looks_like_another_is_refused(tmp_path: Path, server: Path) -> None:
    (server / "site-keys" / "ward.pub").write_bytes(make_key_pair("ward")[1])
    (tmp_path / "Ward.pub").write_bytes(make_key_pair("Ward")[1])

    with pytest.raises(ConfigError, match="differs from the registered ward in capital letters"):
        register_site(server, tmp_path / "Ward.pub")


def test_registered_sites_are_known_by_node(server: Path) -> None:
    keys = server / "site-keys"
    for name, node in (("a", "4711\n"), ("b", "18446744073709551615\n"), ("c", None)):
        (keys / f"{name}.pub").write_bytes(make_key_pair(name)[1])
        if node:
            (keys / f"{name}.node").write_text(node)

    assert registered_sites(server) == {4711: "a", 2**64 - 1: "b"}
    for name, key in registered_keys(server).items():
        assert (server / "site-keys" / f"{name}.pub").read_text() == f"{key} {name}\n"
    assert registered_sites(server / "nowhere") == {}


def test_scripts_and_units_are_well_formed(tmp_path: Path, notes: Path) -> None:
    """Also where a path holds what shells and systemd take for their own."""
    folder = tmp_path / "it's 100% $HOME"
    init_server(folder / "server", ["localhost"])
    init_site(
        folder / "site",
        SiteOptions(
            "a",
            str(notes),
            "localhost:9092",
            str(folder / "server/ca.crt"),
            ["instruction=question"],
        ),
    )

    for script in folder.rglob("*.sh"):
        subprocess.run(["sh", "-n", script], check=True)
    for text in (file.read_text() for file in folder.rglob("*") if file.is_file()):
        assert "@{" not in text
    units = list(folder.rglob("*.service"))
    assert len(units) == 3
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False
        )
        assert "is not executable" not in done.stderr
        assert not [line for line in done.stderr.splitlines() if str(folder) in line]


def test_command_line(tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server, site = str(tmp_path / "server"), str(tmp_path / "site")
    fixed = ["--name", "a", "--data", str(notes), "--server", "localhost:9092"]

    assert cli.main(["server", "init", server, "--host", "localhost"]) == 0
    ca = ["--ca", f"{server}/ca.crt"]
    assert cli.main(["site", "init", site, *fixed, *ca, "--column", "instruction=question"]) == 0
    assert "3 of 3 records" in capsys.readouterr().out
    assert cli.main(["site", "init", site, *fixed, *ca]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "not empty" in error
    assert "Traceback" not in error
