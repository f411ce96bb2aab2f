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
from fedllm_flwr.config.schema import ColumnsConfig
from fedllm_flwr.data.sources import SourceReport, open_source
from fedllm_flwr.deployment.approval import EVERY_RUN, RULES
from fedllm_flwr.deployment.certificates import fingerprint, read_ca
from fedllm_flwr.deployment.datasets import (
    PREFIX,
    SiteDataset,
    checked_preprocessing,
    named_columns,
    named_paths,
)
from fedllm_flwr.deployment.directory import (
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
from fedllm_flwr.deployment.keys import key_fingerprint, make_key_pair
from fedllm_flwr.deployment.node import DEVICES, check_gpus, every_role, parse_columns, to_toml
from fedllm_flwr.deployment.policy import new_policy
from fedllm_flwr.deployment.programs import PROGRAMS
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
    """What an operator says about a site."""

    name: str
    data: str | Sequence[str]  # file or directory of records, or NAME=PATH for each of several
    server: str  # host:port
    ca: str | None = None  # file with the server's certificate authority
    columns: Sequence[str] = ()  # role=column, or NAME.role=column for one of several data sets
    preprocessing: str = "none"
    model_path: str | None = None  # this site's own copy of the base model
    device: str = "auto"
    insecure: bool = False
    health_port: int | None = None  # None: one that follows from the name
    approval: str = EVERY_RUN  # which runs wait for the operator
    policy: Sequence[str] = ()  # key=value in the place of the policy's defaults
    threads: int | None = None  # of the CPU; None: see `node.site_threads`
    gpus: str | None = None  # as CUDA_VISIBLE_DEVICES; None: all

    @property
    def datasets(self) -> dict[str, SiteDataset]:
        """The data sets by name, "" for the only one.

        Raises:
            ConfigError: options that do not fit each other.
        """
        paths = named_paths([self.data] if isinstance(self.data, str) else self.data)
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
        """Where the SuperNode answers health checks; several sites of a machine need not clash."""
        port = self.health_port
        if port is None:
            port = _HEALTH_PORTS[zlib.crc32(self.name.encode()) % len(_HEALTH_PORTS)]
        return f"127.0.0.1:{port}"


def init_site(directory: str | Path, options: SiteOptions) -> list[str]:
    """Make a site's directory, after its data is read once.

    Returns:
        Lines for the operator.

    Raises:
        ConfigError: an option that cannot be, or a directory that is not new.
        DataError: the data cannot be read or has no usable record.
    """
    folder = absolute(directory)
    check_new(folder)
    check_name(options.name, "--name")
    _check_address(options.server)
    if options.health_port is not None and not 1 <= options.health_port < 65_536:
        raise ConfigError(f"--health-port {options.health_port}: give 1 to 65535")
    if options.approval not in RULES:
        raise ConfigError(
            f"--approval {shown(options.approval)}: no such rule; use one of {', '.join(RULES)}"
        )
    authority = _read_authority(options)
    check_gpus(options.gpus)
    if options.threads is not None and options.threads < 1:
        raise ConfigError(f"--threads {options.threads}: give 1 or more")
    found = {name: usable_records(dataset) for name, dataset in options.datasets.items()}
    usable = {task for reports in found.values() for task in reports}
    fit_for = tuple(task for task in tasks.names() if task in usable)
    models = ("embedded",) if options.model_path is None else ("own",)
    policy = new_policy(
        options.policy,
        tasks=fit_for,
        allowed_models=models,
        approval=options.approval,
    )
    files = {
        "node.toml": NewFile(_node_config(folder, options)),
        "policy.yaml": NewFile(filled("policy.yaml", **policy)),
        "state/README": NewFile(filled("state.md")),
        "start-supernode.sh": NewFile(
            filled(
                "start-supernode.sh",
                fedllm=f"{program_folder()}/fedllm",
                python=python_program(),
            ),
            PROGRAM,
        ),
        SUPERNODE: NewFile(_supernode(options)),
        **{f"bin/{name}": NewFile(_guarded(name), PROGRAM) for name in PROGRAMS},
        "systemd/fedllm-supernode.service": NewFile(_unit(folder, options.name)),
        "README.md": NewFile(_readme(folder, options)),
    }
    if authority is not None:
        private, public = make_key_pair(options.name)
        files["ca.crt"] = NewFile(authority)
        files[f"{options.name}.key"] = NewFile(private, SECRET)
        files[f"{options.name}.pub"] = NewFile(public)
    write_new(folder, files)
    return _report(folder, options, found)


def _check_address(server: str) -> None:
    host, _, port = server.rpartition(":")
    is_bracketed = re.fullmatch(r"\[[0-9A-Fa-f:.]+\]", host) is not None
    is_host = bool(re.fullmatch(r"[A-Za-z0-9._-]+", host)) or is_bracketed
    if not is_host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ConfigError(f"--server {shown(server)}: give host:port, as fl.example.org:9092")
    if is_bracketed:
        try:
            ipaddress.ip_address(host[1:-1])
        except ValueError:
            raise ConfigError(f"--server {shown(server)}: no IPv6 address in brackets") from None


def _read_authority(options: SiteOptions) -> bytes | None:
    """The checked file of --ca; None without encryption."""
    if options.insecure:
        if options.ca is not None:
            raise ConfigError(
                "--insecure and --ca exclude each other; leave --insecure out for an encrypted "
                "connection"
            )
        return None
    if options.ca is None:
        raise ConfigError(
            "--ca is missing: give the ca.crt that the server's operator has sent, or --insecure "
            "for no encryption and no authentication"
        )
    file = absolute(options.ca)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"--ca {shown(options.ca)}: {error.strerror}; give ca.crt") from None
    read_ca(content, shown(options.ca))
    return content


def usable_records(dataset: SiteDataset) -> dict[str, SourceReport]:
    """What became of a data set's records, by task that it is fit for.

    Raises:
        DataError: the data cannot be read, or are fit for no task.
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
        named = ColumnsConfig()
        pairs = {config.columns.chosen, config.columns.rejected} - {named.chosen, named.rejected}
        raise _in_terms_of_options(errors["dpo" if pairs or _wants_pairs(errors) else "sft"])
    return reports


def _wants_pairs(errors: Mapping[str, DataError]) -> bool:
    """Whether a file holds transcripts of preference pairs: its own error says what to do."""
    return "hh_rlhf" in str(errors["dpo"])


def _in_terms_of_options(error: DataError) -> DataError:
    """The reader's error with this command's options in place of configuration keys."""
    text = re.sub(r"data\.columns\.(\w+)=", r"--column \1=", str(error))
    text = re.sub(r"data\.columns\.(\w+)", r"--column \1=...", text)
    text = re.sub(r"data\.path[:=] ?", "--data ", text)
    text = text.replace("data.preprocessing=", "--preprocessing ")
    return DataError(text.replace("data.columns", "--column"))


def _node_config(folder: Path, options: SiteOptions) -> str:
    if options.device not in DEVICES:
        raise ConfigError(
            f"--device {shown(options.device)}: no such device; choose from {', '.join(DEVICES)}"
        )
    values: dict[str, str | int | Path] = {"client-name": options.name}
    if options.model_path is not None:
        values["model-path"] = _model(options.model_path)
    values["device"] = options.device
    if options.gpus is not None:
        values["gpus"] = options.gpus
    if options.threads is not None:
        values["threads"] = options.threads
    values |= {
        "state-dir": folder / "state",
        "policy-path": folder / "policy.yaml",
        "site-dir": folder,  # requests for approval and the audit log
        "server-address": options.server,
    }
    text = _NODE_COMMENT + to_toml(values)
    for name, dataset in options.datasets.items():
        prefix = f"{PREFIX}{name}." if name else ""
        keys = {f"{prefix}{key}": str(value) for key, value in dataset.keys.items()}
        text += (_DATA_COMMENT if name else _COLUMNS_COMMENT) + to_toml(keys)
    return text


def _model(path: str) -> Path:
    folder = absolute(path)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model-path {shown(path)}: no config.json there; give the directory of a model as "
            "`hf download` or save_pretrained writes it"
        )
    return folder


def _supernode(options: SiteOptions) -> str:
    values = {"superlink": options.server, "health-server-address": options.health_address}
    if options.insecure:
        return _SUPERNODE_COMMENT + to_toml(values) + "insecure = true\n"
    values |= {
        "root-certificates": "ca.crt",
        "auth-supernode-private-key": f"{options.name}.key",
    }
    return _SUPERNODE_COMMENT + to_toml(values)


def _guarded(program: str) -> str:
    return filled("guarded.sh", python=python_program(), program=program)


def _unit(folder: Path, name: str) -> str:
    return systemd_unit(
        folder,
        "start-supernode.sh",
        f"Federated fine-tuning: site {name}",
        "network-online.target",
        restart_s=_RESTART_S,
        gpu=True,
    )


def _readme(folder: Path, options: SiteOptions) -> str:
    name = options.name
    if options.insecure:
        security_rows = "| (no keys) | made with `--insecure`: no encryption, no authentication |"
        before_start = ""
    else:
        security_rows = (
            f"| `{name}.pub` | this site's public key; **send it to the server's operator** |\n"
            f"| `{name}.key` | its private key; it never leaves this machine |\n"
            "| `ca.crt` | by which this site knows the server |"
        )
        before_start = (
            f"Send `{name}.pub` to the server's operator, who registers it once. Then, and at any "
            "time:\n"
        )
    return filled(
        "site.md",
        name=name,
        folder=shlex.quote(str(folder)),
        superlink=options.server,
        health=options.health_address,
        security_rows=security_rows,
        before_start=before_start,
    )


def _report(
    folder: Path, options: SiteOptions, found: Mapping[str, Mapping[str, SourceReport]]
) -> list[str]:
    lines = []
    paths = named_paths([options.data] if isinstance(options.data, str) else options.data)
    for name, reports in found.items():
        called = f" ({name})" if name else ""
        lines += [
            f"{report.usable} of {report.read} records of {paths[name]}{called} are usable for "
            f"task={task}."
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
        authority = fingerprint((folder / "ca.crt").read_bytes())
        public = folder / f"{options.name}.pub"
        lines += [
            f"  send       {public} to the server's operator",
            f"  telephone  compare with the server's operator: SHA-256 of ca.crt {authority}",
            f"             and of your key {key_fingerprint(public.read_bytes())}",
        ]
    return [
        *lines,
        f"  limits     {folder / 'policy.yaml'} says what a server may ask; look it over",
        _APPROVAL[options.approval].format(folder=shlex.quote(str(folder))),
        f"  start      fedllm site start {shlex.quote(str(folder))}",
        f"  check      fedllm site check {shlex.quote(str(folder))} shows what will be learned",
        f"  look       fedllm status {shlex.quote(str(folder))}",
    ]
