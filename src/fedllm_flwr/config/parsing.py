"""Parses plain data, trusted or not, into a `Config`: strict types, and no references."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedllm_flwr.config.names import field_of, shown, unknown_choice, unknown_key
from fedllm_flwr.config.schema import Config
from fedllm_flwr.config.validation import validate
from fedllm_flwr.errors import ConfigError

_parser = TypeAdapter(Config)

_TYPES = {
    "int_type": "must be a whole number, got {value}.",
    "too_large": "must be below 2^63, got {value}.",
    "float_type": "must be a number, got {value}.",
    "finite_number": "must be a finite number, got {value}.",
    "bool_type": "must be true or false, got {value}.",
    "string_type": "must be text, got {value}; quote it, as \"'...'\".",
    "list_type": "must be a list, got {value}; write {key}=[{value}].",
}
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def from_dict(values: Mapping[str, Any]) -> Config:
    """Typed, validated configuration from plain data, such as a server's message.

    Missing keys take their defaults. Strings are literal: references ``${...}`` are not resolved,
    so that a message cannot read a site's environment. Paths are not checked, as they have no
    meaning on another machine.

    Raises:
        ConfigError: a key is unknown, a type is wrong, or the combination is invalid.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"configuration={shown(values)} must be a section of keys.")
    try:
        config = _parser.validate_python(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise ConfigError(_sentence(min(details, key=_severity))) from None
    validate(config)
    return config


def _severity(error: ErrorDetails) -> int:
    """Sort key: unknown keys and wrong types come before values outside a choice or a range."""
    if error["type"] == "literal_error" and error["input"] is not None:
        return 1
    return 2 if error["type"] in _BOUNDS else 0


def _sentence(error: ErrorDetails) -> str:
    """Translate a pydantic error into one line with key, value and remedy."""
    kind, value = error["type"], error["input"]
    location = error["loc"]
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        return unknown_key(".".join(map(str, location)))
    is_item = len(location) > 1 and isinstance(location[-1], int)
    key = ".".join(map(str, location[:-1] if is_item else location))
    text = shown(value)
    if value is None and not is_item:
        return f"{key}=null must have a value; leave it out for its default."
    if value == "???":  # OmegaConf's mark of a missing value
        return f"{key} is required here; add {key}=<value>."
    if kind == "literal_error":
        return unknown_choice(key, value, field_of(key).choices)
    if kind == "blank":
        return f"{key}={text} must be text; give a value or leave the key out."
    if kind == "float_type" and isinstance(value, int) and not isinstance(value, bool):
        kind = "too_large"  # beyond any float
    if kind in _TYPES:
        return f"{key} {_TYPES[kind].format(key=key, value=text)}"
    if kind in _BOUNDS:
        field = field_of(key)
        number = float(value) if field.takes_fractions else value
        return f"{key} must be {_range(field.info)}, got {shown(number)}."
    if kind == "dataclass_type":
        return f"{key}={text} must be a section of keys."
    return f"{key}={text}: {error['msg'].lower()}."


def _range(info: FieldInfo) -> str:
    """The range of a key: ``> 0``, ``>= 0`` or an interval."""
    limits = {
        name: getattr(constraint, name)
        for constraint in info.metadata
        for name in ("gt", "ge", "lt", "le")
        if hasattr(constraint, name)
    }
    low = next(
        (f"{sign} {limits[n]}" for n, sign in (("gt", ">"), ("ge", ">=")) if n in limits), ""
    )
    high = next(
        (f"{sign} {limits[n]}" for n, sign in (("lt", "<"), ("le", "<=")) if n in limits), ""
    )
    if not (low and high):
        return low or high
    opening, closing = "[" if "ge" in limits else "(", "]" if "le" in limits else ")"
    return f"in {opening}{low.split()[1]}, {high.split()[1]}{closing}"
