"""What can be configured, and what is: the texts of ``fedllm config``."""

import inspect
import re
from dataclasses import dataclass, is_dataclass
from functools import reduce

from fedllm_flwr.config.compose import existing_dir, to_yaml
from fedllm_flwr.config.names import group_choices, key_types, shown
from fedllm_flwr.config.schema import Config

_FIELD = re.compile(r"^    (\w+): (.+?) = .+?(?:  # (.+))?$", re.MULTILINE)


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
    """Every key that takes a value; types and meanings are read off the schema's source."""
    names = (name for name, hint in key_types().items() if not is_dataclass(hint))
    return [_key(name) for name in names if not name.startswith("data.eval_columns.")]


def _key(name: str) -> Key:
    *sections, leaf = name.split(".")
    owner = reduce(getattr, sections, Config())
    written = {m[1]: (m[2], m[3] or "") for m in _FIELD.finditer(inspect.getsource(type(owner)))}
    hint, meaning = written[leaf]
    return Key(name, hint, shown(getattr(owner, leaf)), meaning)
