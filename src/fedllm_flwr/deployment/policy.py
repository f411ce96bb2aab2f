"""What a site lets a server ask of it: ``policy.yaml``, read and enforced at the site."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedllm_flwr.config import Config
from fedllm_flwr.config.names import shown
from fedllm_flwr.deployment.approval import EVERY_RUN, RULES
from fedllm_flwr.errors import ConfigError, RefusedError

TASKS = ("sft", "dpo")
ANY = "any"


@dataclass(frozen=True)
class Policy:
    """A site's limits; None means that the site sets no limit.

    Messages of `check` go to the server: they hold what it asked and what is allowed, nothing of
    the site's data or paths.
    """

    allowed_models: tuple[str, ...] | None = None  # values of model.path
    tasks: tuple[str, ...] | None = None  # values of task.name
    max_steps: int | None = None  # optimizer steps per round
    max_epochs: float | None = None  # passes over the data per round, where steps are not counted
    max_batch_size: int | None = None  # examples per optimizer step
    max_rounds: int | None = None
    max_length: int | None = None  # tokens of one example
    max_lora_rank: int | None = None
    approval: str = EVERY_RUN  # which runs wait for the operator: see deployment/approval.py

    def check(self, config: Config, round: int) -> None:
        """Refuse a request that exceeds a limit.

        Args:
            config: as the server sent it, before the site's own values replace any of it.
            round: of the request; 0 before the first.

        Raises:
            RefusedError: names key, asked value, limit and who can change it.
        """
        self._check_choice("allowed_models", "model.path", config.model.path)
        self._check_choice("tasks", "task", config.task.name)
        training, federation = config.training, config.federation
        batch = training.batch_size * training.gradient_accumulation_steps
        largest = training.micro_batch_size or 0
        asked: dict[str, tuple[str, float]] = {
            "max_batch_size": ("training.batch_size x gradient_accumulation_steps", batch),
            "max_rounds": ("federation.num_rounds", max(federation.num_rounds, round)),
            "max_length": ("training.max_length", training.max_length),
            "max_lora_rank": ("lora.r", config.lora.r),
        }
        if largest > batch:
            asked["max_batch_size"] = ("training.micro_batch_size", largest)
        if training.max_steps > 0:
            asked["max_steps"] = ("training.max_steps", training.max_steps)
        else:
            asked["max_epochs"] = ("training.num_epochs", training.num_epochs)
        for name, (key, value) in asked.items():
            self._check_limit(name, key, value)

    def _check_choice(self, name: str, key: str, value: str) -> None:
        allowed: tuple[str, ...] | None = getattr(self, name)
        if allowed is not None and value not in allowed:
            raise _refused(key, value, f"is not among its {name}", ", ".join(allowed))

    def _check_limit(self, name: str, key: str, value: float) -> None:
        limit: float | None = getattr(self, name)
        # "not <=" also refuses NaN.
        if limit is not None and not value <= limit:
            raise _refused(key, value, f"is above its {name}", f"{limit:g}")


def _refused(key: str, value: object, relation: str, limit: str) -> RefusedError:
    return RefusedError(
        f"the site refuses {key}={shown(value)}: it {relation} ({limit}); ask for less, or let "
        "the site's operator change this site's policy.yaml"
    )


def read_policy(path: str | Path) -> Policy:
    """Read ``policy.yaml``; a key that is left out, or null, sets no limit.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, or a value has another type.
    """
    import yaml

    file = Path(path).expanduser()
    try:
        text = file.read_text("utf-8")
        _refuse_repeated(file, text)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise _wrong(file, f"{reason}; give the site's policy with policy-path") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise _wrong(file, f"not valid YAML{line} ({getattr(error, 'problem', error)})") from None
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise _wrong(file, "must hold lines of the form max_steps: 1000")
    return Policy(**{_known(file, key): _value(file, key, values[key]) for key in values})


def _refuse_repeated(file: Path, text: str) -> None:
    """A key may stand only once: YAML would let the last one win unseen."""
    import yaml

    node = yaml.compose(text, yaml.SafeLoader)
    if isinstance(node, yaml.MappingNode):
        keys = [str(key.value) for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise _wrong(file, f"{shown(repeated[0])} stands twice; keep one")


def _known(file: Path, key: Any) -> str:
    names = [field.name for field in fields(Policy)]
    if key in names:
        return str(key)
    close = difflib.get_close_matches(str(key).lower(), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise _wrong(file, f"unknown key {shown(key)!r}.{hint} Known: {', '.join(names)}")


def _value(file: Path, key: str, value: Any) -> Any:
    if value is None and key == "approval":
        return EVERY_RUN
    if value is None or (key == "allowed_models" and value == ANY):
        return None
    reader: Callable[[Any], Any] = _READERS.get(key, _whole_number)
    try:
        return reader(value)
    except ValueError as error:
        raise _wrong(file, f"{key}: {shown(value)} {error}") from None


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("must be a list of names, as [first, second]")
    if not value:
        raise ValueError("allows nothing; name at least one, or stop the site's SuperNode")
    return tuple(value)


def _task_names(value: Any) -> tuple[str, ...]:
    names = _names(value)
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"names no task with {shown(unknown[0])}; tasks are {', '.join(TASKS)}")
    return names


def _rule(value: Any) -> str:
    if value not in RULES:
        raise ValueError(f"is no rule; use one of: {', '.join(RULES)}")
    return str(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError("must be a number above 0, or null for no limit")
    return float(value)


def _whole_number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError("must be a whole number above 0, or null for no limit")
    return value


_READERS: dict[str, Callable[[Any], Any]] = {
    "approval": _rule,
    "allowed_models": _names,
    "tasks": _task_names,
    "max_epochs": _number,
}


def _wrong(file: Path, reason: str) -> ConfigError:
    return ConfigError(f"this site's {file.name}: {reason}.", "its policy file cannot be read")
