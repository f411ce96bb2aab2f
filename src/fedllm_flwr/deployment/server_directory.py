"""The directory of a federation's server: certificates, start scripts, Flower's connection."""

import ipaddress
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm_flwr import __version__
from fedllm_flwr.deployment.certificates import (
    CA_DAYS,
    LOOPBACK,
    SERVER_DAYS,
    fingerprint,
    issue_ca,
    issue_server,
    subject_alternative_names,
)
from fedllm_flwr.deployment.flower import CONNECTION
from fedllm_flwr.deployment.new_directory import (
    FLWR_HOME,
    PROGRAM,
    SECRET,
    NewFile,
    absolute,
    check_new,
    filled,
    program_folder,
    python_program,
    systemd_unit,
    write_new,
)
from fedllm_flwr.deployment.node import to_toml
from fedllm_flwr.deployment.site_keys import SITE_KEYS
from fedllm_flwr.errors import ConfigError

_MAX_PORT_BASE = 65_531
_TLS_OPTIONS = """\
--ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key \\
  --enable-supernode-auth"""


@dataclass(frozen=True)
class Ports:
    """The server's five ports; only `fleet` is open to other machines."""

    appio: int  # ServerAppIo: the server's own app, private
    fleet: int  # the sites' SuperNodes
    control: int  # flwr run, flwr supernode: private
    superlink_health: int  # gRPC health checks: loopback
    superexec_health: int  # the same

    @classmethod
    def from_base(cls, base: int) -> "Ports":
        """Five consecutive ports.

        Raises:
            ConfigError: they are out of range.
        """
        if not 1 <= base <= _MAX_PORT_BASE:
            raise ConfigError(
                f"--port-base {base}: give 1 to {_MAX_PORT_BASE}, for five ports in a row"
            )
        return cls(*range(base, base + 5))


def init_server(
    directory: str | Path,
    hosts: Sequence[str],
    port_base: int = 9091,
    insecure: bool = False,
    private_host: str = LOOPBACK[1],
) -> list[str]:
    """Create a server's directory.

    Args:
        hosts: names and addresses at which the sites reach this server.
        insecure: no TLS, no authentication.
        private_host: host at which the server's own app and commands reach the SuperLink; anyone
            who can reach it can start runs.

    Returns:
        Lines for the operator.

    Raises:
        ConfigError: a host or port is invalid, or the directory is not new.
    """
    folder, ports = absolute(directory), Ports.from_base(port_base)
    check_new(folder)
    names = [*hosts, private_host]
    subject_alternative_names(names)  # checks them
    control = dial_address(private_host, ports.control)
    # Flower's config.toml accepts only an absolute path of root-certificates.
    trust = "insecure = true\n" if insecure else to_toml({"root-certificates": folder / "ca.crt"})
    connection = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
    # Listen on IPv6 too if a host is an IPv6 address.
    interfaces = "[::]" if any(":" in host for host in hosts) else "0.0.0.0"
    values = {
        "bin": program_folder(),
        "python": python_program(),
        "appio": dial_address(private_host, ports.appio),
        "fleet": f"{interfaces}:{ports.fleet}",
        "control": control,
        "unproxied": ",".join(dict.fromkeys([private_host, *LOOPBACK])),
        "superlink_health": f"127.0.0.1:{ports.superlink_health}",
        "superexec_health": f"127.0.0.1:{ports.superexec_health}",
        "security": "--insecure" if insecure else _TLS_OPTIONS,
    }
    files = {
        # Without it, any user of this machine could take over the run's app.
        "superexec.secret": NewFile(secrets.token_hex(32), SECRET),
        f"{SITE_KEYS}/README": NewFile(filled("site-keys.txt")),
        f"{FLWR_HOME}/config.toml": NewFile(connection + to_toml({"address": control}) + trust),
        "app/pyproject.toml": NewFile(filled("app.toml", version=__version__)),
        "README.md": NewFile(_readme(folder, hosts, private_host, ports, insecure)),
        **{
            name: NewFile(filled(name, **values), PROGRAM)
            for name in ("start.sh", "start-superlink.sh", "start-superexec.sh")
        },
    }
    for part, needs in (("superlink", ""), ("superexec", " fedllm-superlink.service")):
        files[f"systemd/fedllm-{part}.service"] = NewFile(
            systemd_unit(
                folder,
                f"start-{part}.sh",
                f"Federated fine-tuning: {part}",
                f"network-online.target{needs}",
                restart_s=5,
                gpu=part == "superexec",
            )
        )
    if not insecure:
        ca = issue_ca()
        server = issue_server(ca, names)
        files |= {
            "ca.crt": NewFile(ca.certificate_pem),
            "ca.key": NewFile(ca.key_pem, SECRET),
            "server.crt": NewFile(server.certificate_pem),
            "server.key": NewFile(server.key_pem, SECRET),
        }
    write_new(folder, files)
    return _report(folder, names, ports, insecure)


def _readme(
    folder: Path, hosts: Sequence[str], private_host: str, ports: Ports, insecure: bool
) -> str:
    """README.md of the directory, including the openssl commands for a new authority."""
    alternative_names = []
    for name in dict.fromkeys([*hosts, private_host, *LOOPBACK]):
        try:
            ipaddress.ip_address(name)
            alternative_names.append(f"IP:{name}")
        except ValueError:
            alternative_names.append(f"DNS:{name}")
    return filled(
        "server-insecure.md" if insecure else "server.md",
        folder=shlex.quote(str(folder)),
        bin=program_folder(),
        site_server=dial_address(hosts[0], ports.fleet),
        appio=str(ports.appio),
        fleet=str(ports.fleet),
        control=str(ports.control),
        private=private_host,
        superlink_health=str(ports.superlink_health),
        superexec_health=str(ports.superexec_health),
        connection=CONNECTION,
        ca_days=str(CA_DAYS),
        server_days=str(SERVER_DAYS),
        common_name=hosts[0],
        alternative_names=",".join(alternative_names),
    )


def dial_address(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _report(folder: Path, hosts: Sequence[str], ports: Ports, insecure: bool) -> list[str]:
    dial = dial_address(hosts[0], ports.fleet)
    if insecure:
        return [
            f"Made {folder}, WITHOUT encryption and authentication: whoever reaches port "
            f"{ports.fleet} reads the adapters and can take part. Use it on a closed network only.",
            f"  start      {folder / 'start.sh'}",
            f"  each site  fedllm site init <dir> --name <site> --data <file> --server {dial} "
            "--insecure",
            f"  firewall   let the sites reach TCP port {ports.fleet}; nothing else",
        ]
    print_of_ca = fingerprint((folder / "ca.crt").read_bytes())
    return [
        f"Made {folder}: certificate for {', '.join(dict.fromkeys([*hosts, *LOOPBACK]))}, valid "
        f"{SERVER_DAYS} days (its authority {CA_DAYS} days).",
        f"  start      {folder / 'start.sh'}",
        f"  look       fedllm status {shlex.quote(str(folder))}",
        f"  each site  send it {folder / 'ca.crt'}; there: fedllm site init <dir> --name <site> "
        f"--data <file> --server {dial} --ca ca.crt",
        f"  telephone  each site compares SHA-256 of ca.crt: {print_of_ca}",
        f"  register   fedllm server register {shlex.quote(str(folder))} <site>.pub",
        f"  firewall   let the sites reach TCP port {ports.fleet}; nothing else",
        f"  more       {folder / 'README.md'}",
    ]
