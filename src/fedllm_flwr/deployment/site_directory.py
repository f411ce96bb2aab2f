"""The directory of a site: its node config, its keys, its policy and its start script."""

import ipaddress
import re
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm_flwr import tasks
from fedllm_flwr.config.names import shown
from fedllm_flwr.data.sources import SourceReport, open_source
from fedllm_flwr.deployment.approval import EVERY_RUN, RULES
from fedllm_flwr.deployment.certificates import fingerprint, read_ca
from fedllm_flwr.deployment.datasets import (
    SiteDataset,
    checked_preprocessing,
    named_columns,
    named_paths,
)
from fedllm_flwr.deployment.new_directory import (
    PROGRAM,
    SECRET,
    NewFile,
    absolute,
    check_name,
    check_new,
    filled,
    program_folder,
    python_program,
    systemd_unit,
    write_new,
)
from fedllm_flwr.deployment.node import (
    DATASETS,
    DEVICES,
    check_gpus,
    every_role,
    parse_columns,
    to_toml,
)
from fedllm_flwr.deployment.policy import new_policy
from fedllm_flwr.deployment.programs import PROGRAMS
from fedllm_flwr.deployment.site_keys import key_fingerprint, make_key_pair
from fedllm_flwr.deployment.starting import SUPERNODE
from fedllm_flwr.errors import ConfigError, DataError

_NODE_COMMENT = "# Only this machine reads this file; none of it can be changed by a server.\n"
_SUPERNODE_COMMENT = "# How `fedllm site start` starts this site: options of flower-supernode.\n"
_COLUMNS_COMMENT = '\n# The data, and which column plays which role; "" for none.\n'
_DATA_COMMENT = "\n# A data set, which a server asks for with data.site_dataset=<name>.\n"
_HEALTH_PORTS = range(9200, 9900)
_APPROVAL = {
    "every-run": "  approve    each run waits for you: fedllm site requests {folder}",
    "new-settings": "  approve    new settings wait for you: fedllm site requests {folder}",
    "automatic": "  approve    nothing waits for you: whatever the limits allow is done",
}
_RESTART_S = 20  # seconds; a site counts as online for up to 60 s after its SuperNode has died


@dataclass(frozen=True)
class SiteOptions:
    """An operator's choices for a site."""

    name: str
    data: str | Sequence[str]  # file or directory of records, or NAME=PATH for each of several
    server: str  # host:port
    ca: str | None = None  # file with the server's certificate authority
    columns: Sequence[str] = ()  # role=column, or NAME.role=column for one of several data sets
    preprocessing: str = "none"
    model_path: str | None = None  # this site's own copy of the base model
    device: str = "auto"
    insecure: bool = False
    health_port: int | None = None  # None: derived from the name
    approval: str = EVERY_RUN  # which runs wait for the operator
    policy: Sequence[str] = ()  # key=value, overrides of the policy's defaults
    threads: int | None = None  # CPU threads; None: see `node.site_threads`
    lora_rank: int | None = None  # maximum rank of an adapter; None: the server's choice
    gpus: str | None = None  # as CUDA_VISIBLE_DEVICES; None: all

    @property
    def paths(self) -> dict[str, str]:
        """Paths of the data sets by name, "" for the only one."""
        return named_paths([self.data] if isinstance(self.data, str) else self.data)

    @property
    def datasets(self) -> dict[str, SiteDataset]:
        """The data sets by name, "" for the only one.

        Raises:
            ConfigError: options contradict each other.
        """
        paths = self.paths
        columns = named_columns(self.columns, list(paths))
        preprocessing = checked_preprocessing(self.preprocessing)
        return {
            name: SiteDataset(
                name,
                {
                    "data-path": str(absolute(path)),
                    "preprocessing": preprocessing,
                    **every_role(parse_columns(columns[name])),
                },
            )
            for name, path in paths.items()
        }

    @property
    def health_address(self) -> str:
        """Address of the SuperNode's health checks; its port follows from the site's name."""
        port = self.health_port
        if port is None:
            port = _HEALTH_PORTS[zlib.crc32(self.name.encode()) % len(_HEALTH_PORTS)]
        return f"127.0.0.1:{port}"

    def check(self) -> None:
        """Reject invalid options.

        Raises:
            ConfigError: names the option.
        """
        check_name(self.name, "--name")
        host, _, port = self.server.rpartition(":")
        is_bracketed = re.fullmatch(r"\[[0-9A-Fa-f:.]+\]", host) is not None
        is_host = bool(re.fullmatch(r"[A-Za-z0-9._-]+", host)) or is_bracketed
        server = shown(self.server)
        if not is_host or not port.isdecimal() or not 0 < int(port) < 65_536:
            raise ConfigError(f"--server {server}: give host:port, as fl.example.org:9092")
        if is_bracketed:
            try:
                ipaddress.ip_address(host[1:-1])
            except ValueError:
                raise ConfigError(f"--server {server}: no IPv6 address in brackets") from None
        if self.health_port is not None and not 1 <= self.health_port < 65_536:
            raise ConfigError(f"--health-port {self.health_port}: give 1 to 65535")
        if self.approval not in RULES:
            raise ConfigError(
                f"--approval {shown(self.approval)}: no such rule; use one of {', '.join(RULES)}"
            )
        check_gpus(self.gpus)
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads {self.threads}: give 1 or more")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ConfigError(f"--lora-rank {self.lora_rank}: give 1 or more")
        if self.device not in DEVICES:
            raise ConfigError(
                f"--device {shown(self.device)}: no such device; choose from {', '.join(DEVICES)}"
            )
        if (
            self.model_path is not None
            and not (absolute(self.model_path) / "config.json").is_file()
        ):
            raise ConfigError(
                f"--model-path {shown(self.model_path)}: no config.json there; give the directory "
                "of a model as `hf download` or save_pretrained writes it"
            )

    def authority(self) -> bytes | None:
        """The certificate authority in the file of --ca; None without encryption.

        Raises:
            ConfigError: --ca is missing or unreadable, or is combined with --insecure.
        """
        if self.insecure and self.ca is not None:
            raise ConfigError(
                "--insecure and --ca exclude each other; leave --insecure out for an encrypted "
                "connection"
            )
        if self.insecure:
            return None
        if self.ca is None:
            raise ConfigError(
                "--ca is missing: give the ca.crt that the server's operator has sent, or "
                "--insecure for no encryption and no authentication"
            )
        try:
            content = absolute(self.ca).read_bytes()
        except OSError as error:
            raise ConfigError(f"--ca {shown(self.ca)}: {error.strerror}; give ca.crt") from None
        read_ca(content, shown(self.ca))
        return content

    def node_config(self, folder: Path) -> str:
        """The file ``node.toml`` of the site's directory."""
        own: dict[str, str | int | Path | None] = {
            "client-name": self.name,
            "model-path": None if self.model_path is None else absolute(self.model_path),
            "device": self.device,
            "gpus": self.gpus,
            "threads": self.threads,
            "lora-rank": self.lora_rank,
            "state-dir": folder / "state",
            "policy-path": folder / "policy.yaml",
            "site-dir": folder,  # requests for approval and the audit log
            "server-address": self.server,
        }
        text = _NODE_COMMENT + to_toml({k: v for k, v in own.items() if v is not None})
        for name, dataset in self.datasets.items():
            prefix = f"{DATASETS}{name}." if name else ""
            keys = {f"{prefix}{key}": str(value) for key, value in dataset.keys.items()}
            text += (_DATA_COMMENT if name else _COLUMNS_COMMENT) + to_toml(keys)
        return text


def init_site(directory: str | Path, options: SiteOptions) -> list[str]:
    """Create a site's directory, after reading its data once.

    Returns:
        Lines for the operator.

    Raises:
        ConfigError: an option is invalid, or the directory is not new.
        DataError: the data cannot be read or has no usable record.
    """
    folder = absolute(directory)
    check_new(folder)
    options.check()
    authority = options.authority()
    found = {name: usable_records(dataset) for name, dataset in options.datasets.items()}
    usable = {task for reports in found.values() for task in reports}
    policy = new_policy(
        options.policy,
        tasks=tuple(task for task in tasks.names() if task in usable),
        allowed_models=("embedded",) if options.model_path is None else ("own",),
        approval=options.approval,
    )
    python, quoted = python_program(), shlex.quote(str(folder))
    supernode: dict[str, str | int | Path] = {
        "superlink": options.server,
        "health-server-address": options.health_address,
    }
    security_rows = "| (no keys) | created with `--insecure`: no encryption, no authentication |"
    before_start = ""
    files: dict[str, NewFile] = {}
    if authority is None:
        insecure = "insecure = true\n"
    else:
        insecure, name = "", options.name
        supernode |= {"root-certificates": "ca.crt", "auth-supernode-private-key": f"{name}.key"}
        private, public = make_key_pair(name)
        files = {
            "ca.crt": NewFile(authority),
            f"{name}.key": NewFile(private, SECRET),
            f"{name}.pub": NewFile(public),
        }
        security_rows = (
            f"| `{name}.pub` | this site's public key; **send it to the server's operator** |\n"
            f"| `{name}.key` | its private key; it never leaves this machine |\n"
            "| `ca.crt` | authenticates the server to this site |"
        )
        before_start = (
            f"Send `{name}.pub` to the server's operator, who registers it once. Then, and at any "
            "time:\n"
        )
    files |= {
        "node.toml": NewFile(options.node_config(folder)),
        SUPERNODE: NewFile(_SUPERNODE_COMMENT + to_toml(supernode) + insecure),
        "policy.yaml": NewFile(filled("policy.yaml", **policy)),
        "state/README": NewFile(filled("state.md")),
        "start-supernode.sh": NewFile(
            filled("start-supernode.sh", fedllm=f"{program_folder()}/fedllm", python=python),
            PROGRAM,
        ),
        **{
            f"bin/{name}": NewFile(filled("guarded.sh", python=python, program=name), PROGRAM)
            for name in PROGRAMS
        },
        "systemd/fedllm-supernode.service": NewFile(
            systemd_unit(
                folder,
                "start-supernode.sh",
                f"Federated fine-tuning: site {options.name}",
                "network-online.target",
                restart_s=_RESTART_S,
                gpu=True,
            )
        ),
        "README.md": NewFile(
            filled(
                "site.md",
                name=options.name,
                folder=quoted,
                superlink=options.server,
                health=options.health_address,
                security_rows=security_rows,
                before_start=before_start,
            )
        ),
    }
    write_new(folder, files)
    return _report(folder, options, found)


def _report(
    folder: Path, options: SiteOptions, found: Mapping[str, Mapping[str, SourceReport]]
) -> list[str]:
    """Report for the operator: the data, the created files and the next steps."""
    quoted = shlex.quote(str(folder))
    lines = []
    for name, reports in found.items():
        called = f" ({name})" if name else ""
        lines += [
            f"{report.usable} of {report.read} records of {options.paths[name]}{called} are usable "
            f"for task={task}."
            for task, report in reports.items()
        ]
        unused = set.intersection(*(set(report.unused_columns) for report in reports.values()))
        if unused:
            lines.append(
                f"  NOT USED   {', '.join(sorted(unused))}: no role is mapped to these columns "
                "(--column input=... for the context of an instruction)"
            )
    lines.append(f"Made {folder} for site {options.name}.")
    if options.insecure:
        lines.append(
            "  WARNING    --insecure: nothing that travels is encrypted, and the server cannot "
            "tell who takes part."
        )
    else:
        public = folder / f"{options.name}.pub"
        lines += [
            f"  send       {public} to the server's operator",
            "  telephone  compare with the server's operator: SHA-256 of ca.crt "
            f"{fingerprint((folder / 'ca.crt').read_bytes())}",
            f"             and of your key {key_fingerprint(public.read_bytes())}",
        ]
    return [
        *lines,
        f"  limits     {folder / 'policy.yaml'} limits the server's requests; review it",
        _APPROVAL[options.approval].format(folder=quoted),
        f"  start      fedllm site start {quoted}",
        f"  check      fedllm site check {quoted} shows what will be learned",
        f"  look       fedllm status {quoted}",
    ]


def usable_records(dataset: SiteDataset) -> dict[str, SourceReport]:
    """Counts of a data set's records, for each task that can use them.

    Raises:
        DataError: the data cannot be read, or no task can use them; names options of this command.
    """
    config = dataset.config()
    reports: dict[str, SourceReport] = {}
    errors: dict[str, DataError] = {}
    for task in tasks.names():
        try:
            reports[task] = open_source(config, tasks.find(task).records).scan().report
        except DataError as error:
            errors[task] = error
    if not reports:
        meant = [name for name in errors if tasks.find(name).claims(config.columns, errors[name])]
        text = str(errors[(*meant, *errors)[0]])
        text = re.sub(r"data\.columns\.(\w+)=", r"--column \1=", text)
        text = re.sub(r"data\.columns\.(\w+)", r"--column \1=...", text)
        text = re.sub(r"data\.path[:=] ?", "--data ", text)
        text = text.replace("data.preprocessing=", "--preprocessing ")
        raise DataError(text.replace("data.columns", "--column"))
    return reports
