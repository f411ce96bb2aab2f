"""Parses overrides with Hydra's grammar; rejects each mistake with a one-line message."""

import itertools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from fedllm_flwr.config.names import (
    is_known,
    schema_fields,
    shown,
    unknown_choice,
    unknown_key,
    without_none,
)
from fedllm_flwr.errors import ConfigError

Choices = Mapping[str, Sequence[str]]
"""Names of the choices of each group."""

# Groups whose name determines the meaning of other keys: selected as a group, with its defaults.
_WHOLE = ("algorithm", "partition", "quantization", "task")


@dataclass(frozen=True)
class Setting:
    """One override ``key=value``; the value of a group is one of its choices."""

    key: str
    value: Any
    is_choice: bool


def split_overrides(text: str) -> list[str]:
    """Split a string into overrides at whitespace outside quotes; backslashes are kept.

    Raises:
        ConfigError: a quote is not closed.
    """
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    try:
        return list(lexer)
    except ValueError as error:
        raise ConfigError(f"overrides={shown(text)}: a quote is not closed.") from error


def read_overrides(texts: Iterable[str], choices: Choices) -> list[Setting]:
    """Assignments of single values, including ``config=<file>`` and ``group=choice``.

    Raises:
        ConfigError: a text is not an override, a key or choice is unknown, or a key has two values.
    """
    read: dict[str, Setting] = {}
    for text in texts:
        override = _parsed(text)
        key = override.key_or_group
        field = schema_fields().get(key)
        hint = without_none(field.hint)[0] if field else None
        if override.is_sweep_override():
            as_one = ""
            if hint is str:
                as_one = f", or write it as one text, {key}=\"'...'\""
            elif get_origin(hint) is list or hint is Any:
                as_one = f", or write it as one list, {key}=[...]"
            raise ConfigError(
                f"{shown(text)} lists several values: add --multirun to run each of them{as_one}."
            )
        value = override.value()
        if field and field.takes_text and isinstance(value, int | float):
            value = text.partition("=")[2].strip()  # digits as typed, as in revision=1e3
        new = _assignment(key, value, choices)
        if key in read and read[key] != new:
            old = f"{key}={shown(read[key].value)}"
            raise ConfigError(f"{old} and {key}={shown(new.value)} exclude each other; keep one.")
        read[key] = new
    return list(read.values())


def expand_sweep(texts: Sequence[str], choices: Choices) -> list[list[str]]:
    """Cartesian product of ``a,b``, choice(), range() and glob() sweeps, in the order typed.

    Raises:
        ConfigError: a text is not an override, or a sweep does not list its values.
    """
    return [list(texts) for texts in itertools.product(*(_swept(text, choices) for text in texts))]


def _swept(text: str, choices: Choices) -> list[str]:
    override = _parsed(text)
    if not override.is_sweep_override():
        return [text]
    key, value = override.key_or_group, override.value()
    if isinstance(value, Glob):
        values = value.filter(list(choices.get(key, ())))
    elif override.is_discrete_sweep():
        values = list(override.sweep_string_iterator())
    else:
        values = []
    if not values:
        raise ConfigError(f"{shown(text)} names no values to run; list them, as {key}=a,b.")
    if twice := [value for value in values if values.count(value) > 1]:
        raise ConfigError(f"{shown(text)} lists {twice[0]} twice; list each value once.")
    return [f"{key}={value}" for value in values]


def _parsed(text: str) -> Override:
    """Parse one override; a bare value that Hydra's grammar rejects (spaces, brackets) is text.

    Rejects overrides that add or delete keys, or that configure Hydra itself.
    """
    override = _by_hydra("=".join(map(str.strip, text.split("=", 1))))
    if override is None or not override.key_or_group:
        match = re.match(r"\s*([+~]{0,2})([\w./@:$-]+)\s*=", text)
        if not match:
            raise ConfigError(
                f"cannot read {shown(text)!r}: write key=value, without blanks around =."
            )
        key, value = match[2], text[match.end() :]
        if key.startswith("-"):
            bare = text.strip().lstrip("-")
            raise ConfigError(f"{shown(text)}: options are written without dashes, {shown(bare)}.")
        if not re.match(r"""\s*(['"\[{]|$)""", value):
            override = _by_hydra(f"{match[1]}{key}={quoted(value)}")
        if override is None:
            raise ConfigError(
                f"cannot read {shown(text)!r}: write lists as {key}=[a,b] and text with special "
                f"characters in quotes, {key}=\"'...'\"."
            )
    key = override.key_or_group
    if key.split(".")[0].split("/")[0] == "hydra":
        raise ConfigError(
            f"{shown(text)}: Hydra's own settings have no effect here; drop it "
            "(output_dir=<folder> says where the results go)."
        )
    if not is_known(key) and key not in ("experiment", "config"):
        raise ConfigError(unknown_key(key))
    if override.is_delete():
        raise ConfigError(f"{shown(text)}: keys cannot be removed; write {key}=<value>.")
    if override.is_add() or override.is_force_add():
        raise ConfigError(f"{shown(text)}: every key is there already; write {key}=<value>.")
    if override.package is not None:
        raise ConfigError(f"{shown(text)}: a choice has one place; write {key}=<choice>.")
    return override


def _by_hydra(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError):  # ValueError: a number with thousands of digits
        return None


def quoted(value: str) -> str:
    r"""`value` as a quoted string of Hydra's grammar: \ is special only before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value.strip())
    return f"'{escaped}'"


def _assignment(key: str, value: Any, choices: Choices) -> Setting:
    if key in choices and not isinstance(value, dict):
        if value not in choices[key] and not (key == "experiment" and value is None):
            raise ConfigError(unknown_choice(key, value, choices[key]))
        return Setting(key, value, is_choice=True)
    field = schema_fields().get(key)
    if field and field.is_section and not isinstance(value, dict):
        if value is None and without_none(field.hint)[1]:
            return Setting(key, value, is_choice=False)
        first = next(name for name in schema_fields() if name.startswith(f"{key}."))
        raise ConfigError(f"{key}={shown(value)}: set one of its keys, such as {first}=<value>.")
    group, _, leaf = key.partition(".")
    if leaf == "name" and group in _WHOLE:
        raise ConfigError(
            f"{key}={shown(value)}: write {group}={shown(value)}, which also sets what belongs "
            "to it."
        )
    return Setting(key, value, is_choice=False)
