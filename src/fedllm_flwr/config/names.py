"""Names of keys, groups and choices, and messages for unknown names."""

import difflib
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from fedllm_flwr.config.schema import Config, Registered
from fedllm_flwr.plugins import CONF_GROUP, plugin_folders

_PACKAGE = Path(__file__).parents[1]
# Other programs' names of some keys, which are too different to be found by similarity.
_SAID_ELSEWHERE = {
    "lr": "learning_rate",
    "min_lr": "min_learning_rate",
    "epochs": "num_epochs",
    "steps": "max_steps",
    "rounds": "num_rounds",
    "clients": "num_clients",
    "bs": "batch_size",
    "rank": "r",
    "seq_length": "max_length",
    "max_seq_length": "max_length",
}
_LONGEST_SHOWN = 120  # characters of a value in a message
_MOST_LISTED = 20  # choices in a message that already suggests one


def conf_dir() -> Path:
    """Directory of the YAML groups, in an installed wheel or in a checkout."""
    installed = _PACKAGE / "conf"
    return installed if installed.is_dir() else _PACKAGE.parents[1] / "conf"


def group_choices(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Groups with their choices, from the package, installed plug-ins and `config_dir`."""
    folders = sorted(folder for folder in conf_dir().iterdir() if folder.is_dir())
    groups = {folder.name: {file.stem for file in folder.glob("*.yaml")} for folder in folders}
    for more in [*plugin_folders(CONF_GROUP), *([config_dir] if config_dir else [])]:
        for name, choices in groups.items():
            choices |= {file.stem for file in (more / name).glob("*.yaml")}
    return {name: sorted(choices) for name, choices in groups.items()}


def without_none(hint: Any) -> tuple[Any, bool]:
    """A type hint without its ``None``, and whether it had one."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [arg for arg in get_args(hint) if arg is not type(None)]
        return rest[0], len(rest) < len(get_args(hint))
    return hint, False


@dataclass(frozen=True)
class SchemaField:
    """One key of the schema: a value or a section of keys."""

    hint: Any  # its type, without pydantic's annotations
    info: FieldInfo  # its default, range and meaning

    @property
    def choices(self) -> tuple[str, ...]:
        """Allowed values; empty if every value of the type is allowed."""
        for mark in self.info.metadata:
            if isinstance(mark, Registered):
                return mark.names
        inner, _ = without_none(self.hint)
        return get_args(inner) if get_origin(inner) is Literal else ()

    @property
    def is_section(self) -> bool:
        """Whether this is a section of keys, such as ``training``."""
        return is_dataclass(without_none(self.hint)[0])

    @property
    def takes_fractions(self) -> bool:
        """Whether fractions are allowed."""
        return without_none(self.hint)[0] is float

    @property
    def takes_text(self) -> bool:
        """Whether digits are read as text, as in a revision."""
        return bool(self.choices) or without_none(self.hint)[0] is str


@cache
def schema_fields() -> dict[str, SchemaField]:
    """Every dotted key of the schema, including sections."""

    def walk(cls: Any, prefix: str) -> Iterator[tuple[str, SchemaField]]:
        hints, infos = get_type_hints(cls), cls.__pydantic_fields__
        for name, hint in hints.items():
            found = SchemaField(hint, infos[name])
            yield prefix + name, found
            if found.is_section:
                yield from walk(without_none(hint)[0], f"{prefix}{name}.")

    return dict(walk(Config, ""))


def field_of(key: str) -> SchemaField:
    """The schema field of a dotted `key`."""
    return schema_fields()[key]


def is_known(key: str) -> bool:
    """Whether `key` is in the schema, or inside a key that contains free keys."""
    sections = key.split(".")
    return key in schema_fields() or any(
        (field := schema_fields().get(".".join(sections[:depth])))
        and get_origin(field.hint) is dict
        for depth in range(1, len(sections))
    )


def unknown_key(key: str) -> str:
    """Message for an unknown key, with the closest key of the schema."""
    close = closest_key(key)
    hint = f" Did you mean {close!r}?" if close else ""
    return f"unknown key {shown(key)!r}.{hint} (fedllm config --list has every key)"


def closest_key(key: str) -> str | None:
    """The key of the schema closest to `key`; None if none is close."""
    known = {name.lower(): name for name in schema_fields()}
    lowered = key.lower().replace("/", ".")
    section, _, leaf = lowered.rpartition(".")
    leaf = _SAID_ELSEWHERE.get(leaf, leaf)
    lowered = f"{section}.{leaf}" if section else leaf
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    siblings = [name for name in known if section and name.startswith(section + ".")]
    for candidates, cutoff in ((siblings, 0.75), (same_leaf, 0.0), (list(known), 0.6)):
        if close := difflib.get_close_matches(lowered, candidates, n=1, cutoff=cutoff):
            return known[close[0]]
    return None


def unknown_choice(key: str, value: Any, choices: Sequence[str]) -> str:
    """Message for a value outside `choices`, with the closest of them, or all unless too many."""
    hint = did_you_mean(value, choices)
    all_of_them = f" Choose from {', '.join(choices)}."
    if hint and len(choices) > _MOST_LISTED:
        all_of_them = f" (fedllm config --list {key} has all {len(choices)})"
    return f"{key}={shown(value)}: no such choice.{hint}{all_of_them}"


def did_you_mean(value: object, known: Iterable[str], cutoff: float = 0.5) -> str:
    """ " Did you mean 'x'?" with the one of `known` closest to `value`; "" if none is close."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(value).lower(), lowered, n=1, cutoff=cutoff)
    return f" Did you mean {shown(lowered[close[0]])!r}?" if close else ""


def shown(value: Any) -> str:
    """A value on one line, as a user would type it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = f"[{','.join(map(shown, value))}]" if isinstance(value, list) else str(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."
