"""Output of ``fedllm config``: the resolved configuration, and the list of groups and keys."""

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from functools import reduce
from typing import Any, Literal, get_args, get_origin

from fedllm_flwr.config.compose import existing_dir, to_yaml
from fedllm_flwr.config.names import (
    closest_key,
    group_choices,
    schema_fields,
    shown,
    without_none,
)
from fedllm_flwr.config.schema import Config
from fedllm_flwr.errors import ConfigError


@dataclass(frozen=True)
class Key:
    """One key of the schema, as users see it."""

    name: str
    type: str
    default: str
    help: str


def describe(config: Config) -> str:
    """The resolved configuration as YAML, ready to be saved and read back."""
    return to_yaml(config)


def list_choices(config_dir: str | None = None, words: Sequence[str] = ()) -> str:
    """Groups with their choices, and keys with type, default and meaning, filtered by `words`.

    Raises:
        ConfigError: no name, choice or meaning contains one of the words.
    """
    groups = {
        name: " | ".join(some) for name, some in group_choices(existing_dir(config_dir)).items()
    }
    typed = {f"{key.name}: {key.type} = {key.default}": key.help for key in keys()}
    for word in words:
        if not any(_holds(line, [word]) for line in (*groups.items(), *typed.items())):
            close = closest_key(word)
            hint = f" Did you mean {close!r}?" if close else ""
            raise ConfigError(f"--list {shown(word)}: no group or key has this in it.{hint}")
    sections = []
    for title, lines in (("Groups (group=choice)", groups), ("Keys (section.key=value)", typed)):
        wanted = {name: text for name, text in lines.items() if _holds((name, text), words)}
        width = max(map(len, wanted), default=0)
        rows = [f"  {name:<{width}}  {text}".rstrip() for name, text in wanted.items()]
        sections += ["\n".join([title, *rows])] if rows else []
    return "\n\n".join(sections) + "\n"


def _holds(line: tuple[str, str], words: Sequence[str]) -> bool:
    """Whether a line contains one of the words; true without words."""
    text = " ".join(line).lower()
    return not words or any(word.lower() in text for word in words)


def keys() -> list[Key]:
    """All keys of the schema that take a value."""
    return [
        Key(
            name,
            _type_name(field.hint),
            shown(reduce(getattr, name.split("."), Config())),
            field.info.description or " | ".join(field.choices),
        )
        for name, field in schema_fields().items()
        if not (is_dataclass(field.hint) or name.startswith("data.eval_columns."))
    ]


def _type_name(hint: Any) -> str:
    """A type hint as text; a choice is ``str``."""
    inner, is_optional = without_none(hint)
    if get_origin(inner) is Literal:
        name = "str"
    else:
        name = str(inner) if get_args(inner) else getattr(inner, "__name__", str(inner))
    return f"{name} | None" if is_optional else name
