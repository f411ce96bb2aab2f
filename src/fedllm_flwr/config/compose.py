"""Composition of a `Config` from Hydra groups and overrides, and its YAML round trip."""

import difflib
import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
)
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from fedllm_flwr.config.schema import Config
from fedllm_flwr.config.validation import validate, validate_paths
from fedllm_flwr.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]


def conf_dir() -> Path:
    """Directory of the YAML groups: inside an installed wheel, or of the checkout."""
    installed = _PACKAGE / "conf"
    return installed if installed.is_dir() else _PACKAGE.parents[1] / "conf"


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> Config:
    """Compose, type and validate the configuration that `overrides` select.

    Args:
        overrides: Hydra overrides (``group=choice``, ``section.key=value``).
        config_dir: further directory of YAML groups, searched before the package's own.

    Raises:
        ConfigError: unknown key or choice, wrong type, or an impossible combination.
    """
    parsed = _parse(overrides)
    _reject_conflicts(parsed)
    texts = [override.input_line or "" for override in parsed]
    search = [f"hydra.searchpath=[file://{_existing_dir(config_dir)}]"] if config_dir else []
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            node = hydra_compose("config", overrides=[*search, *texts])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, parsed, config_dir)) from error
    return _checked(_typed(OmegaConf.to_container(node)))


def load_yaml(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a saved ``config.yaml`` and apply ``section.key=value`` overrides to it.

    Raises:
        ConfigError: the file is missing or is no configuration of this package.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"config={path}: no such file; give the config.yaml of an earlier run.")
    try:
        saved = OmegaConf.load(file)
    except Exception as error:  # PyYAML raises several unrelated types
        raise ConfigError(f"config={path}: not valid YAML ({_first_line(error)}).") from error
    return apply_overrides(_typed(OmegaConf.to_container(saved)), overrides)


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Change single keys of a composed configuration; groups cannot be chosen here."""
    node = OmegaConf.structured(asdict(config))
    for override in _parse(overrides):
        key = override.key_or_group
        if OmegaConf.select(node, key, default=_ABSENT) is _ABSENT:
            raise ConfigError(_unknown_key(key))
        if isinstance(OmegaConf.select(node, key), type(node)):
            raise ConfigError(
                f"{key}={override.value()}: a saved configuration takes section.key=value only; "
                "drop config=... to choose another group."
            )
        OmegaConf.update(node, key, override.value())
    return _checked(_typed(OmegaConf.to_container(node)))


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Cartesian product of comma-separated and range() sweeps (Hydra's multirun grammar)."""
    choices = []
    for override in _parse(overrides):
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line or ""])
    return [list(combination) for combination in itertools.product(*choices)]


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; `load_yaml` reads it back unchanged."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def from_dict(values: dict[str, Any]) -> Config:
    """Typed, validated configuration from plain data, such as a server's message.

    Paths are not looked at: they mean nothing on another machine.
    """
    return _typed(values)


_ABSENT = object()


def _checked(config: Config) -> Config:
    validate_paths(config)
    return config


def _typed(values: Any) -> Config:
    schema = OmegaConf.structured(Config)
    try:
        merged = OmegaConf.merge(schema, values)
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = str(error.full_key or "").strip()
        raise ConfigError(f"{key} is required here; add {key}=<value>.") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_typing_message(error)) from error
    assert isinstance(config, Config)
    validate(config)
    return config


def _parse(overrides: Sequence[str]) -> list[Override]:
    return [_parse_one(text) for text in overrides]


def _parse_one(text: str) -> Override:
    """One override; a bare value outside Hydra's grammar (a path with spaces) is a string."""
    parser = OverridesParser.create()
    key, _, value = text.partition("=")
    attempts = [text]
    if re.match(r"[\w./~]", value) and "'" not in value:
        attempts.append(f"{key}='{value}'")
    for attempt in attempts:
        try:
            return parser.parse_override(attempt)
        except HydraException:
            continue
    raise ConfigError(f"cannot read override {text!r}: write key=value (lists as key=[a,b]).")


def _reject_conflicts(overrides: Sequence[Override]) -> None:
    """Refuse two values for one key, and lists where a group takes one choice."""
    seen: dict[str, Any] = {}
    groups = _groups()
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if key in seen and seen[key] != value:
            raise ConfigError(f"{key}={seen[key]} and {key}={value} exclude each other; keep one.")
        if key in groups and isinstance(value, list):
            raise ConfigError(f"{key}={value}: choose one of {', '.join(groups[key])}.")
        seen[key] = value


def _groups() -> dict[str, list[str]]:
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(conf_dir().iterdir())
        if folder.is_dir()
    }


def group_choices(config_dir: str | None = None) -> dict[str, list[str]]:
    """Names of the groups and, for each, the choices of the package and of `config_dir`."""
    groups = _groups()
    for folder in Path(config_dir).iterdir() if config_dir else ():
        if folder.is_dir():
            found = {file.stem for file in folder.glob("*.yaml")}
            groups[folder.name] = sorted({*groups.get(folder.name, ()), *found})
    return groups


def known_keys() -> list[str]:
    """Every dotted key of the schema."""

    def walk(cls: Any, prefix: str) -> list[str]:
        keys: list[str] = []
        for item in fields(cls):
            keys.append(prefix + item.name)
            if is_dataclass(item.type):
                keys += walk(item.type, f"{prefix}{item.name}.")
        return keys

    return walk(Config, "")


def _unknown_key(key: str) -> str:
    known = known_keys()
    leaf = key.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    close = close or [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1]
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown key {key!r}.{hint} (fedllm config lists every key)"


def _explain(error: Exception, overrides: Sequence[Override], config_dir: str | None) -> str:
    groups = group_choices(config_dir)
    text = str(error)
    if isinstance(error, MissingConfigException) or "Could not find" in text:
        for override in overrides:
            key, value = override.key_or_group, override.value()
            if key in groups and str(value) not in groups[key]:
                close = difflib.get_close_matches(str(value), groups[key], n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                return f"{key}={value}: no such choice.{hint} Choose from {', '.join(groups[key])}."
    if match := re.search(r"Could not override '([^'@]+)", text):
        return _unknown_key(match.group(1))
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
        return _typing_message(error.__cause__)
    return _first_line(error)


def _typing_message(error: BaseException) -> str:
    key = getattr(error, "full_key", None) or ""
    text = _first_line(error)
    if "not in" in text and "Key" in text:
        return _unknown_key(str(key))
    return f"{key}: {text}" if key and key not in text else text


def _existing_dir(path: str) -> Path:
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir {path}: no such directory.")
    return folder


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
