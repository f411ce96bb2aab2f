"""Composition of a `Config` from Hydra groups and overrides, and its YAML round trip."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from fedllm_flwr.config import overrides as grammar
from fedllm_flwr.config.names import conf_dir, group_choices, shown, unknown_choice, unknown_key
from fedllm_flwr.config.overrides import Setting, read_overrides, split_overrides
from fedllm_flwr.config.parsing import from_dict
from fedllm_flwr.config.schema import Config
from fedllm_flwr.config.validation import validate_paths
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.plugins import CONF_GROUP, plugin_folders

__all__ = [
    "apply_overrides",
    "compose",
    "expand_sweep",
    "from_run_config",
    "load_run",
    "load_yaml",
    "to_yaml",
]


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> Config:
    """Compose, type and validate the configuration that `overrides` select.

    Args:
        overrides: Hydra overrides (``group=choice``, ``section.key=value``). With
            ``config=<file>``, or with ``resume=<run>`` and no group, they modify that saved
            configuration instead of the groups.
        config_dir: directory with further choices of the package's groups.

    Raises:
        ConfigError: a key or choice is unknown, a type is wrong, or the combination is invalid.
    """
    folder = existing_dir(config_dir)
    assignments = read_overrides(overrides, group_choices(folder))
    saved = [item.value for item in assignments if item.key == "config"]
    if saved:
        return _load(saved[0], [item for item in assignments if item.key != "config"])
    choices = [item for item in assignments if item.is_choice and item.value is not None]
    stopped = [item.value for item in assignments if item.key == "resume" and item.value]
    if stopped and not choices and Path(str(stopped[-1])).expanduser().is_dir():
        return _load(stopped[-1], assignments, "resume")
    chosen = [f"{item.key}={item.value}" for item in choices]
    values = _composed(chosen, folder)
    for item in assignments:
        if not item.is_choice:
            _assign(values, item)
    return _checked(_resolved(values))


def from_run_config(run_config: Mapping[str, Any]) -> Config:
    """The configuration of ``flwr run --run-config 'overrides="..." config="..."'``.

    Raises:
        ConfigError: as in `compose`, or the run config has another key than these two.
    """
    for key, value in run_config.items():
        text = f"{key}={shown(value)}"
        if key not in ("overrides", "config"):
            raise ConfigError(f"--run-config {text}: write --run-config 'overrides=\"{text}\"'.")
        if not isinstance(value, str):
            raise ConfigError(f"--run-config {text} must be text: write '{key}=\"...\"'.")
    overrides = split_overrides(run_config.get("overrides", ""))
    saved = run_config.get("config", "")
    return load_yaml(saved, overrides) if saved else compose(overrides)


def load_yaml(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a saved ``config.yaml`` (or that of a run directory) and change single keys.

    Raises:
        ConfigError: the file is missing or is not a configuration of this package, or an override
            selects a group.
    """
    return _load(path, read_overrides(overrides, group_choices()))


def load_run(path: str | Path, typed: str) -> Config:
    """The configuration of the run in a directory; messages show the path as the user `typed` it.

    Raises:
        ConfigError: there is no run, or its configuration is not one of this package.
    """
    return _load(path, [], "resume", typed)


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Change single keys of a composed configuration; groups cannot be selected here."""
    return _changed(asdict(config), read_overrides(overrides, group_choices()))


def expand_sweep(overrides: Sequence[str], config_dir: str | None = None) -> list[list[str]]:
    """Overrides of each run of a multirun (Hydra's sweep grammar), the last sweep fastest."""
    return grammar.expand_sweep(overrides, group_choices(existing_dir(config_dir)))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; `load_yaml` reads it back unchanged."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def _load(
    path: Any, assignments: Sequence[Setting], key: str = "config", typed: str | None = None
) -> Config:
    """Load the configuration at `path`, named by the override `key`, and apply assignments."""
    file = Path(str(path)).expanduser()
    where = typed or f"{key}={shown(str(path))}"
    file = file / "config.yaml" if file.is_dir() or key == "resume" else file
    if not file.parent.exists() and key == "resume":
        raise ConfigError(f"{where}: no such directory; give that of a run.")
    if not file.is_file() and key == "resume":
        raise ConfigError(f"{where}: holds no run (no config.yaml); give the directory of a run.")
    if not file.is_file():
        raise ConfigError(f"{where}: no such file; give the config.yaml of an earlier run.")
    try:
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except Exception as error:  # PyYAML raises several unrelated types
        raise ConfigError(f"{where}: not valid YAML ({_cause(error)}).") from error
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{where}: holds no configuration; give the config.yaml of a run.")
    try:
        return _changed(asdict(from_dict(cast(dict[str, Any], values))), assignments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _changed(values: dict[Any, Any], assignments: Sequence[Setting]) -> Config:
    for item in assignments:
        text = f"{item.key}={shown(item.value)}"
        if item.is_choice:
            raise ConfigError(
                f"{text}: a saved configuration takes section.key=value only; compose a new one to "
                "choose another group."
            )
        if "${" in str(item.value):
            raise ConfigError(f"{text}: a saved configuration takes plain values only.")
        _assign(values, item)
    return _checked(values)


def _checked(values: Mapping[Any, Any]) -> Config:
    config = from_dict(values)
    validate_paths(config)
    return config


def _assign(values: dict[Any, Any], item: Setting) -> None:
    """Set one key in nested sections, in place."""
    *sections, leaf = item.key.split(".")
    for name in sections:
        values[name] = values.get(name) or {}  # {}: a section that was null
        values = values[name]
    values[leaf] = _merged(values.get(leaf), item.value)


def _merged(old: Any, new: Any) -> Any:
    """`new`, with sections that exist on both sides merged key by key."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def _composed(chosen: Sequence[str], folder: Path | None) -> dict[Any, Any]:
    """Values of the composed groups, with unresolved references."""
    try:
        if folder is None:
            return copy.deepcopy(_of_package(*chosen))
        return _by_hydra(chosen, folder)
    except Exception as error:  # Hydra's errors, and PyYAML's on a broken file
        raise ConfigError(_explained(error, folder)) from error


@cache
def _of_package(*chosen: str) -> dict[Any, Any]:
    """Composition without user groups, cached: the package's groups do not change at run time."""
    return _by_hydra(chosen)


def _by_hydra(chosen: Sequence[str], *more: Path) -> dict[Any, Any]:
    """Compose with Hydra the groups of the package, of installed plug-ins and of `more`."""
    folders = [grammar.quoted(f"file://{one}") for one in (*plugin_folders(CONF_GROUP), *more)]
    overrides = [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []
    ConfigStore.instance().store(name="schema", node=asdict(Config()))
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        node = hydra_compose("config", overrides=[*overrides, *chosen])
    values = OmegaConf.to_container(node, resolve=False)
    assert isinstance(values, dict)
    return values


def _resolved(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """`values` with resolved references such as ``${data.client_column}``."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(dict(values)), resolve=True)
    except InterpolationResolutionError as error:
        reason = re.sub(r"^.*?Error raised while resolving interpolation: ", "", _cause(error))
        raise ConfigError(f"{error.full_key}: its reference ${{...}} fails ({reason}).") from error
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{error.full_key or 'a value'}: '${{' opens a reference to another key; close it with "
            "'}', or write '\\${' for the characters themselves."
        ) from error
    assert isinstance(resolved, dict)
    return resolved


def _explained(error: Exception, folder: Path | None) -> str:
    """Message for a composition error; the overrides have already been checked."""
    text = str(error)
    if match := re.search(r"Could not find '([\w-]+)/([^']+)'", text):
        group, choice = match.groups()
        return unknown_choice(group, choice, group_choices(folder).get(group, ()))
    if match := re.search(r"Could not override '([^'@]+)", text):
        return unknown_key(match.group(1))
    place = f" in {folder}" if folder else ""
    kind = "" if isinstance(error, HydraException) else "not valid YAML: "
    return f"the YAML groups{place} do not compose: {kind}{_cause(error)}."


def existing_dir(path: str | None) -> Path | None:
    """The user's directory of groups, which may add choices but not replace any."""
    if path is None:
        return None
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir {shown(path)}: no such directory.")
    if not any((folder / group).is_dir() for group in group_choices()):
        raise ConfigError(
            f"--config-dir {shown(path)}: holds no group; put choices into subdirectories such as "
            "data/ or experiment/."
        )
    shipped = ((group, choice) for group, some in group_choices().items() for choice in some)
    for group, choice in shipped:
        if (folder / group / f"{choice}.yaml").is_file() and folder != conf_dir().resolve():
            raise ConfigError(
                f"--config-dir {shown(path)}: {group}/{choice}.yaml has the name of a choice of "
                "the package; rename it."
            )
    return folder


def _cause(error: BaseException) -> str:
    """The first line of an error's text, and its line in the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{getattr(error, 'problem', lines[0])}, line {mark.line + 1}"
    return lines[0].rstrip(".") if lines else type(error).__name__
