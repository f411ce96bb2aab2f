"""What can be configured, and what is: the texts of ``fedllm config``."""

from dataclasses import dataclass, is_dataclass
from functools import reduce
from typing import Any, Literal, get_args, get_origin

from fedllm_flwr.config.compose import existing_dir, to_yaml
from fedllm_flwr.config.names import (
    SchemaField,
    group_choices,
    schema_fields,
    shown,
    without_none,
)
from fedllm_flwr.config.schema import Config


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


def list_choices(config_dir: str | None = None) -> str:
    """Every group with its choices, and every key with its type, default and meaning."""
    groups = group_choices(existing_dir(config_dir))
    width = max(map(len, groups))
    lines = ["Groups (group=choice)"]
    lines += [f"  {name:<{width}}  {' | '.join(some)}" for name, some in groups.items()]
    lines += ["", "Keys (section.key=value)"]
    typed = {f"{key.name}: {key.type} = {key.default}": key.help for key in keys()}
    width = max(map(len, typed))
    lines += [f"  {text:<{width}}  {meaning}".rstrip() for text, meaning in typed.items()]
    return "\n".join(lines) + "\n"


def keys() -> list[Key]:
    """Every key that takes a value, as the schema has it."""
    return [
        Key(name, _type_name(field.hint), shown(_default(name)), _meaning(field))
        for name, field in schema_fields().items()
        if not (is_dataclass(field.hint) or name.startswith("data.eval_columns."))
    ]


def _type_name(hint: Any) -> str:
    """A type as it would be written; a choice is text."""
    inner, is_optional = without_none(hint)
    if get_origin(inner) is Literal:
        name = "str"
    else:
        name = str(inner) if get_args(inner) else getattr(inner, "__name__", str(inner))
    return f"{name} | None" if is_optional else name


def _default(key: str) -> Any:
    return reduce(getattr, key.split("."), Config())


def _meaning(field: SchemaField) -> str:
    return field.info.description or " | ".join(field.choices)
