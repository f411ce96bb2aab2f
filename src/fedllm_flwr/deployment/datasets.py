"""The data sets of a site: one without a name, or several that a server selects by name.

A node config has ``data-path``, ``preprocessing``, ``on-bad-record`` and ``columns.<role>``, or
the same keys under ``datasets.<name>.`` for each of several data sets.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fedllm_flwr.config.names import shown
from fedllm_flwr.config.schema import DataConfig
from fedllm_flwr.deployment.node import COLUMNS, DATASETS, site_columns
from fedllm_flwr.errors import ConfigError, RefusedError
from fedllm_flwr.plugins import PREPROCESSING

_OWN = ("data-path", "preprocessing", "on-bad-record")
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,62})=(.+)", re.DOTALL)


@dataclass(frozen=True)
class SiteDataset:
    """Location and format of a site's records, which only the site decides."""

    name: str  # "" for a site's only data set
    keys: Mapping[str, object]  # keys of the node config, without the prefix of the name

    def config(self, **more: Any) -> DataConfig:
        """The data section of a configuration; `more` are the keys that a server decides.

        Raises:
            ConfigError: a role or preprocessing does not exist.
        """
        preprocessing = str(self.keys.get("preprocessing", "none"))
        return DataConfig(
            path=str(self.keys["data-path"]),
            columns=site_columns(self.keys),
            preprocessing=cast(Any, checked_preprocessing(preprocessing)),
            on_bad_record=cast(Any, str(self.keys.get("on-bad-record", "error"))),
            **more,
        )


def site_datasets(node_config: Mapping[str, object]) -> dict[str, SiteDataset]:
    """The data sets of a node config by name; "" is the only one.

    Raises:
        ConfigError: there is none, one has no data-path, or both forms are used.
    """
    named: dict[str, dict[str, object]] = {}
    for key, value in node_config.items():
        if key.startswith(DATASETS):
            name, _, rest = key.removeprefix(DATASETS).partition(".")
            named.setdefault(name, {})[rest] = value
    own = {
        key: value for key, value in node_config.items() if key in _OWN or key.startswith(COLUMNS)
    }
    if named and own:
        raise ConfigError(
            f"this site's node config has {sorted(own)[0]} beside {DATASETS}*; put it under "
            f"{DATASETS}<name>.",
            "its node config mixes two forms of naming data; the site's log says more",
        )
    found = {name: SiteDataset(name, keys) for name, keys in (named or {"": own}).items()}
    if lacking := [name for name, dataset in found.items() if "data-path" not in dataset.keys]:
        key = f"{DATASETS}{lacking[0]}.data-path" if lacking[0] else "data-path"
        raise RefusedError(
            f"this site's node config lacks {key}; start its SuperNode with "
            '--node-config \'client-name="..." data-path="..."\''
        )
    return dict(sorted(found.items()))


def asked_dataset(node_config: Mapping[str, object], asked: str | None) -> SiteDataset:
    """The data set that a server selects by name, or the only one.

    Args:
        asked: data.site_dataset of the server's configuration.

    Raises:
        RefusedError: no data set has this name, or there are several and no name is given; the
            message does not reveal their names.
    """
    datasets = site_datasets(node_config)
    if asked is None and len(datasets) == 1:
        return next(iter(datasets.values()))
    if asked is None:
        raise RefusedError(
            "the site has several data sets; ask for one with data.site_dataset=<name>, as agreed "
            "with its operator"
        )
    if asked not in datasets or not asked:
        raise RefusedError(
            f"the site has no data set called {shown(asked)}; agree on data.site_dataset with its "
            "operator"
        )
    return datasets[asked]


def named_paths(data: Sequence[str]) -> dict[str, str]:
    """Name -> path, from the values of ``--data``: one path, or NAME=PATH for several data sets.

    Raises:
        ConfigError: one of several has no name, or a name is given twice.
    """
    if len(data) == 1 and (Path(data[0]).expanduser().exists() or not _NAMED.fullmatch(data[0])):
        return {"": data[0]}
    paths: dict[str, str] = {}
    for text in data:
        match = _NAMED.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"--data {shown(text)}: of several data sets each needs a name, as "
                "--data notes=/data/notes.jsonl"
            )
        if match[1] in paths:
            raise ConfigError(f"--data {shown(text)}: the name {match[1]} is given twice")
        paths[match[1]] = match[2]
    return paths


def named_columns(columns: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """The values of ``--column`` by data set.

    ``notes.instruction=question`` applies to the data set notes; a value without a name to all.
    """
    found: dict[str, list[str]] = {name: [] for name in names}
    for assignment in columns:
        name, dot, rest = assignment.partition(".")
        role_first = "=" in name
        if dot and not role_first and name.strip() in found:
            found[name.strip()].append(rest)
        else:
            for assignments in found.values():
                assignments.append(assignment)
    return found


def checked_preprocessing(name: str) -> str:
    """`name`, if it is a known preprocessing.

    Raises:
        ConfigError: it is unknown; lists the known ones.
    """
    choices = PREPROCESSING.names()
    if name not in choices:
        raise ConfigError(
            f"preprocessing={shown(name)} is unknown; use one of: {', '.join(choices)}"
        )
    return name
