"""Plain data to a typed `Config`: strict, without references, whoever wrote the data."""

import math
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_origin, get_type_hints

from fedllm_flwr.config.names import shown, unknown_key, without_none
from fedllm_flwr.config.schema import Config
from fedllm_flwr.config.validation import validate
from fedllm_flwr.errors import ConfigError

_Section = TypeVar("_Section")
_INT64 = 2**63


def from_dict(values: Mapping[str, Any]) -> Config:
    """Typed, validated configuration from plain data, such as a server's message.

    Keys that are left out take their defaults. Strings mean themselves: no reference
    ``${...}`` is followed, so that a message cannot read a site's environment. Paths are not
    looked at: they mean nothing on another machine.

    Raises:
        ConfigError: unknown key, wrong type, or an impossible combination.
    """
    config = _section(Config, values, "")
    validate(config)
    return config


def _section(cls: type[_Section], values: Any, key: str) -> _Section:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key or 'configuration'}={shown(values)} must be a section of keys.")
    hints = get_type_hints(cls)
    prefix = f"{key}." if key else ""
    for name in values:
        if name not in hints:
            raise ConfigError(unknown_key(f"{prefix}{name}"))
    return cls(**{name: _value(hints[name], values[name], prefix + name) for name in values})


def _value(hint: Any, value: Any, key: str) -> Any:
    inner, optional = without_none(hint)
    if value is None and optional:
        return None
    if value is None and inner is not Any:
        raise ConfigError(f"{key}=null must have a value; leave it out for its default.")
    if value == "???":
        raise ConfigError(f"{key} is required here; add {key}=<value>.")
    if is_dataclass(inner):
        return _section(inner, value, key)  # type: ignore[arg-type]
    if get_origin(inner) is list:
        return _strings(value, key)
    return value if inner is Any else _SCALARS[inner](value, key)


def _int(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{key} must be a whole number, got {shown(value)}.")
    if abs(value) >= _INT64:
        raise ConfigError(f"{key} must be below 2^63, got {shown(value)}.")
    return value


def _float(value: Any, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{key} must be a number, got {shown(value)}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, got {shown(value)}.")
    if abs(value) >= _INT64:
        raise ConfigError(f"{key} must be below 2^63, got {shown(value)}.")
    return float(value)


def _bool(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, got {shown(value)}.")
    return value


def _str(value: Any, key: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ConfigError(f"{key} must be text, got {shown(value)}; quote it, as \"'...'\".")
    if not value.strip() or "\0" in value:
        raise ConfigError(f"{key}={shown(value)} must be text; give a value or leave the key out.")
    return value


def _strings(value: Any, key: str) -> list[str]:
    if not isinstance(value, list):
        raise ConfigError(
            f"{key} must be a list, got {shown(value)}; write {key}=[{shown(value)}]."
        )
    return [_str(item, key) for item in value]


_SCALARS: dict[Any, Callable[[Any, str], Any]] = {
    int: _int,
    float: _float,
    bool: _bool,
    str: _str,
}
