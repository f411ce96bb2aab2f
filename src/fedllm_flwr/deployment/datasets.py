"""The data sets of a site: one without a name, or several that a server asks for by name.

In a node config: ``data-path``, ``preprocessing`` and ``columns.<role>``, or the same under
``datasets.<name>.`` for each of several.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedllm_flwr.config.schema import ColumnsConfig, DataConfig
from fedllm_flwr.deployment.node import COLUMNS, site_columns
from fedllm_flwr.errors import ConfigError

_PREFIX = "datasets."
_PATH, _PREPROCESSING = "data-path", "preprocessing"


@dataclass(frozen=True)
class SiteDataset:
    """Where a site's records lie, and how they are read; no server decides on any of it."""

    name: str  # "" for the only one of a site
    keys: Mapping[str, object]  # of the node config, without the prefix of the data set

    @property
    def path(self) -> str:
        """File or directory of records."""
        return str(self.keys[_PATH])

    def applied_to(self, data: DataConfig) -> DataConfig:
        """The server's `data` with what this site decides.

        Raises:
            ConfigError: a role that does not exist.
        """
        return replace(
            data,
            path=self.path,
            columns=site_columns(self.keys, data.columns),
            preprocessing=str(self.keys.get(_PREPROCESSING, data.preprocessing)),
            eval_path=None,
            eval_split=None,
            max_samples=None,
        )

    def config(self) -> DataConfig:
        """The data set by itself, whatever a server will ask."""
        return self.applied_to(DataConfig(columns=ColumnsConfig()))


def site_datasets(node_config: Mapping[str, object]) -> dict[str, SiteDataset]:
    """The data sets of a node config by name; "" names the only one.

    Raises:
        ConfigError: none, one without data-path, or both forms at once.
    """
    named: dict[str, dict[str, object]] = {}
    for key, value in node_config.items():
        if key.startswith(_PREFIX):
            name, _, rest = key.removeprefix(_PREFIX).partition(".")
            named.setdefault(name, {})[rest] = value
    own = {
        key: value
        for key, value in node_config.items()
        if key in (_PATH, _PREPROCESSING) or key.startswith(COLUMNS)
    }
    if named and own:
        raise ConfigError(
            f"this site's node config has {sorted(own)[0]} beside {_PREFIX}*; put it under "
            f"{_PREFIX}<name>."
        )
    if not named and _PATH not in own:
        raise ConfigError(
            "this site's node config lacks data-path; start its SuperNode with "
            '--node-config \'client-name="..." data-path="..."\''
        )
    found = {name: SiteDataset(name, keys) for name, keys in (named or {"": own}).items()}
    if lacking := [name for name, dataset in found.items() if _PATH not in dataset.keys]:
        raise ConfigError(f"this site's node config lacks {_PREFIX}{lacking[0]}.{_PATH}")
    return dict(sorted(found.items()))
