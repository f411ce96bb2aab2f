"""A site's node config, as its SuperNode passes it to the ClientApp."""

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fedllm_flwr.config.names import did_you_mean, shown
from fedllm_flwr.config.schema import ColumnsConfig
from fedllm_flwr.deployment.new_directory import absolute
from fedllm_flwr.errors import ConfigError, RefusedError

DEVICES = ("auto", "cpu", "cuda", "mps")
COLUMNS = "columns."  # columns.<role> = name of the column in the site's file
DATASETS = "datasets."  # datasets.<name>.<key> = value of the key for one of several data sets
_KEYS = (
    *("client-name", "data-path", "device", "gpus", "idle-timeout-s", "lora-rank", "model-path"),
    *("on-bad-record", "policy-path", "preprocessing", "processes", "resident", "server-address"),
    *("site-dir", "state-dir", "threads", "trust-server-code"),
)
_GPUS = re.compile(r"(\d{1,3}|(GPU|MIG)-[0-9A-Fa-f-]+)(,(\d{1,3}|(GPU|MIG)-[0-9A-Fa-f-]+))*")
ROLES = tuple(field.name for field in fields(ColumnsConfig))


def site_folder(directory: str | Path) -> Path:
    """The path of a site's directory.

    Raises:
        ConfigError: it was not made by `fedllm site init`.
    """
    folder = absolute(directory)
    if not (folder / "node.toml").is_file():
        raise ConfigError(f"{folder}: no directory that `fedllm site init` has made")
    return folder


def node_config(folder: Path) -> dict[str, Any]:
    """A site's node config, flat as Flower passes it on, with keys such as ``columns.output``.

    Raises:
        ConfigError: it is not valid TOML, or has a key that this package does not know.
    """
    file = folder / "node.toml"
    try:
        found = flat(tomllib.loads(file.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); correct it") from None
    for key in found:
        if key not in _KEYS and not key.startswith((COLUMNS, DATASETS)):
            hint = did_you_mean(key, _KEYS)
            raise ConfigError(f"{file}: unknown key {shown(key)!r}.{hint} Correct or remove it.")
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        )
    return found


def parse_columns(assignments: Sequence[str]) -> dict[str, str]:
    """Role -> column, from ``--column role=column``.

    Raises:
        ConfigError: a value does not have this form, or a role is unknown or given twice.
    """
    columns: dict[str, str] = {}
    for assignment in assignments:
        role, equals, column = (part.strip() for part in assignment.partition("="))
        if not equals or not column:
            raise ConfigError(
                f"--column {shown(assignment)}: write role=column, as --column instruction=question"
            )
        if role not in ROLES:
            hint = did_you_mean(role, ROLES)
            raise ConfigError(
                f"--column {shown(assignment)}: unknown role {shown(role)!r}.{hint} Roles are "
                f"{', '.join(ROLES)}."
            )
        if role in columns:
            raise ConfigError(f"--column {shown(assignment)}: {role} is given twice; give it once.")
        columns[role] = column
    return columns


def site_columns(node_config: Mapping[str, object]) -> ColumnsConfig:
    """The columns of a site's file from its node config, or the package's defaults.

    A role without a column is written as "". The server's choice is ignored.

    Raises:
        ConfigError: a role does not exist.
    """
    own = {
        key.removeprefix(COLUMNS): str(value) or None
        for key, value in node_config.items()
        if key.startswith(COLUMNS)
    }
    if unknown := sorted(set(own) - set(ROLES)):
        raise ConfigError(
            f"this site's node config: unknown {COLUMNS}{shown(unknown[0])}; roles are "
            f"{', '.join(ROLES)}"
        )
    return replace(ColumnsConfig(), **own)


def site_threads(node_config: Mapping[str, object]) -> int:
    """CPU threads of a site's training: `threads`, otherwise OMP_NUM_THREADS, otherwise all CPUs.

    Raises:
        ConfigError: `threads` is not a positive integer.
    """
    given = node_config.get("threads", os.environ.get("OMP_NUM_THREADS"))
    if given is None:
        cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        return len(cpus) or os.cpu_count() or 1
    return _positive("threads", str(given).partition(",")[0])


def site_processes(node_config: Mapping[str, object]) -> int:
    """Processes that share a site's training: `processes`, otherwise one.

    Raises:
        ConfigError: `processes` is not a positive integer.
    """
    return _positive("processes", str(node_config.get("processes", 1)))


def site_rank(node_config: Mapping[str, object]) -> int | None:
    """The site's own limit of an adapter's rank, `lora-rank`; None if there is none.

    Raises:
        RefusedError: it is not a positive integer.
    """
    rank = node_config.get("lora-rank")
    if rank is None:
        return None
    if type(rank) is not int or rank < 1:
        raise RefusedError(
            "lora-rank of the site's node config is not a positive integer; correct it there"
        )
    return rank


def _positive(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"this site's node config: {key}={shown(text)}: give 1 or more")
    return int(text)


def check_gpus(gpus: str | None) -> None:
    """Require a valid value of CUDA_VISIBLE_DEVICES: numbers or UUIDs of devices.

    Raises:
        ConfigError: it is not valid.
    """
    if gpus is not None and not _GPUS.fullmatch(gpus):
        raise ConfigError(f"--gpus {shown(gpus)}: give numbers of GPUs, as 0 or 0,1, or UUIDs")


def choose_gpus(node_config: Mapping[str, object]) -> None:
    """Restrict this process and its children to the GPUs of a node config.

    Raises:
        ConfigError: `gpus` is not a valid list of devices.
    """
    if "gpus" in node_config:
        check_gpus(str(node_config["gpus"]))
        os.environ["CUDA_VISIBLE_DEVICES"] = str(node_config["gpus"])


def every_role(columns: Mapping[str, str]) -> dict[str, str]:
    """Node config keys that define all roles, so that no server decides what is learned here."""
    settled = replace(ColumnsConfig(), **columns)
    return {f"{COLUMNS}{role}": getattr(settled, role) or "" for role in ROLES}


def to_toml(values: Mapping[str, str | int | Path]) -> str:
    """A node config file: one ``key = "value"`` per line, numbers without quotes."""
    # A basic TOML string is a JSON string in which DEL is escaped too.
    return "".join(
        f"{key} = "
        + (str(value) if isinstance(value, int) else json.dumps(str(value), ensure_ascii=False))
        + "\n"
        for key, value in values.items()
    ).replace("\x7f", "\\u007f")
