"""Site policy: limits on a server's requests, read from ``policy.yaml`` and enforced at the site.

A site whose operator has written no policy has this one's defaults.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedllm_flwr import tasks
from fedllm_flwr.config import Config
from fedllm_flwr.config.names import did_you_mean, shown
from fedllm_flwr.config.schema import ModelConfig, value_of
from fedllm_flwr.deployment.approval import AUTOMATIC, EVERY_RUN, RULES
from fedllm_flwr.errors import ConfigError, RefusedError

OPTIMIZERS = ("adamw", "sgd")
ANY = "any"
EMBEDDED = "embedded"  # in allowed_models: the small model of the package
OWN = "own"  # in allowed_models: the directory that node.toml names with model-path
OPTIONAL, REQUIRED, BY_RECORD = "optional", "required", "record"
"""Values of the policy's key ``privacy``: any run; one with a unit of privacy; with that unit."""
LINEAR_LAYERS = (
    *("auto", "all-linear", "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj"),
    *("query_key_value", "Wqkv", "c_attn", "query", "key", "value", "dense"),
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "c_proj"),
    *("dense_h_to_4h", "dense_4h_to_h", "in_proj"),
)
"""Values of lora.target_modules that stand for attention and MLP layers of transformer blocks."""

_PINNED = re.compile(r"[^/\s@]+/[^/\s@]+@[0-9a-f]{40}")


@dataclass(frozen=True)
class Policy:
    """A site's limits; None means that the site sets no limit.

    The texts of refusals are sent to the server. They contain the request and the limit, but
    nothing about the site's data or paths.
    """

    allowed_models: tuple[str, ...] | None = (EMBEDDED, OWN)  # or id@commit
    tasks: tuple[str, ...] | None = field(default_factory=tasks.names)  # values of task.name
    optimizers: tuple[str, ...] | None = ("adamw",)  # an update of SGD reveals the gradient
    target_modules: tuple[str, ...] | None = LINEAR_LAYERS  # values of lora.target_modules
    min_records_per_step: int | None = 8  # records behind one optimizer step
    min_records_per_round: int | None = 64  # distinct records behind one update
    min_records_per_score: int | None = 32  # held-out records behind one score
    min_length: int | None = 16  # lower bound of training.max_length
    max_length: int | None = 4096  # tokens of one example
    max_steps: int | None = 1000  # optimizer steps per round
    max_epochs: float | None = 5.0  # epochs per round, if training.max_steps is -1
    max_batch_size: int | None = 256  # examples per optimizer step
    max_batch_tokens: int | None = 65_536  # tokens of one forward pass in evaluation
    max_rounds: int | None = 500
    max_lora_rank: int | None = 128
    max_rounds_kept: int | None = 100  # rounds for which the client keeps state
    max_messages_per_run: int | None = 1200
    max_messages_per_day: int | None = 5000
    max_state_gb: float | None = 20.0  # GB of state and tokens on disk
    state_days: float | None = 30.0  # after which the state of an inactive run is removed
    privacy: str = OPTIONAL  # privacy guarantee that a run must have
    max_epsilon: float | None = None  # total of all runs, per data set
    min_noise_multiplier: float | None = None  # of a differentially private run
    secret_draws: bool = True  # the draw of records also depends on a secret of the site
    only_secure: bool = False  # only runs under secure aggregation
    datasets: tuple[str, ...] | None = None  # names of the site's data sets
    approval: str = EVERY_RUN  # which runs wait for the operator: see deployment/approval.py

    @classmethod
    def unlimited(cls) -> "Policy":
        """The policy of a simulated client, whose data belong to the server."""
        limits = {field.name: None for field in fields(cls) if field.name not in _RULES}
        return cls(
            **limits,
            privacy=OPTIONAL,
            secret_draws=False,
            only_secure=False,
            approval=AUTOMATIC,
        )

    def check(self, config: Config, round: int, has_own_model: bool = False) -> None:
        """Refuse a request that exceeds a limit.

        Args:
            config: configuration from the server, before the site's own values replace any of it.
            round: round of the request; 0 before the first.
            has_own_model: whether the site uses its own copy of the base model.

        Raises:
            RefusedError: names the key, the requested value, the limit and who can change it.
        """
        self._check_model(config.model, has_own_model)
        self._check_choice("tasks", "task", config.task.name)
        if self.only_secure and not config.privacy.secure_aggregation:
            relation = "its updates leave only under secure aggregation"
            raise _refused("privacy.secure_aggregation=false", relation, "only_secure: true")
        for bound in tasks.task_of(config).bounds:
            value = value_of(config, bound.key)
            if not bound.low <= value <= bound.high:
                relation = "it is outside of what is accepted"
                raise _refused(
                    f"{bound.key}={shown(value)}", relation, f"{bound.low:g} to {bound.high:g}"
                )
        self._check_choice("optimizers", "training.optimizer", config.training.optimizer)
        targets = config.lora.target_modules
        for target in targets if isinstance(targets, list) else [targets]:
            self._check_choice("target_modules", "lora.target_modules", target)
        self._check_privacy(config)
        for name, (key, asked) in _LIMITS.items():
            value = asked(config, round)
            if value is not None:
                self._check_limit(name, key, value)

    @property
    def asks_for_privacy(self) -> bool:
        """Whether a run must be differentially private."""
        return self.privacy != OPTIONAL or self.max_epsilon is not None

    def _check_privacy(self, config: Config) -> None:
        unit = config.privacy.unit  # whose other keys `config.validation` looks after
        least = "record" if self.privacy == BY_RECORD else "client or record"
        if self.asks_for_privacy and unit not in least.split():
            relation = "its policy asks for differential privacy"
            raise _refused(f"privacy.unit={unit}", relation, f"privacy.unit={least}")

    def check_records(self, config: Config, num_train: int, num_held_out: int) -> None:
        """Refuse training or scoring on too few of the site's records.

        Args:
            num_train: records to train on.
            num_held_out: records held out for scoring.

        Raises:
            RefusedError: names the limit, but not the number of records.
        """
        for name in ("min_records_per_step", "min_records_per_round"):
            limit: int | None = getattr(self, name)
            if limit is not None and num_train < limit:
                raise _refused("to train", f"it holds fewer records than its {name}", str(limit))
        training = config.training
        drawn = num_train * training.num_epochs if training.max_steps < 1 else None
        if drawn is not None:
            self._check_limit("min_records_per_round", "training.num_epochs x records", drawn)
        least = self.min_records_per_score
        if config.evaluation.clients and least is not None and num_held_out < least:
            asked = f"data.validation_fraction={config.data.validation_fraction}"
            relation = "it holds back fewer records than its min_records_per_score"
            remedy = "set evaluation.clients=false, or data.validation_fraction higher"
            raise _refused(f"evaluation.clients=true with {asked}", relation, str(least), remedy)

    def check_kept(self, server_round: int, oldest_checkpoint: int) -> None:
        """Refuse an assignment that would require keeping the state of too many rounds.

        Raises:
            RefusedError: names the limit.
        """
        kept = server_round - oldest_checkpoint
        self._check_limit("max_rounds_kept", "rounds since the oldest checkpoint", kept)

    def check_rank(self, what: str, rank: int) -> None:
        """Refuse factors with a rank above the policy's ``max_lora_rank``.

        Raises:
            RefusedError: names the limit.
        """
        self._check_limit("max_lora_rank", what, rank)

    def check_dataset(self, name: str) -> None:
        """Refuse a data set that the policy does not list; "" is the site's only one.

        Raises:
            RefusedError: does not name the site's other data sets.
        """
        if self.datasets is not None and name and name not in self.datasets:
            raise RefusedError(
                f"the site refuses data.site_dataset={shown(name)}: it is not among its datasets; "
                "let the site's operator change this site's policy.yaml"
            )

    def check_tensors(self, names: Iterable[str]) -> None:
        """Refuse adapters of layers that the policy does not allow, however they were selected.

        Args:
            names: PEFT state-dict names, as ``base_model.model.h.0.attn.c_attn.lora_A.weight``.

        Raises:
            RefusedError: the first name outside the transformer blocks.
        """
        if self.target_modules is None:
            return
        listed = set(self.target_modules) - set(LINEAR_LAYERS)
        for name in names:
            module = re.sub(r"\.(lora_\w+|base_layer)(\.\w+)*$", "", name).rpartition(".")[2]
            in_block = re.search(r"\.\d+\.", name) and "lora_embedding" not in name
            if not in_block and module not in listed:
                relation = "it is outside of the transformer blocks"
                raise _refused(f"an adapter of {shown(name)}", relation, "target_modules")

    def _check_model(self, model: ModelConfig, has_own_model: bool) -> None:
        allowed = self.allowed_models
        if allowed is None or (has_own_model and OWN in allowed):
            return
        asked = model.path if model.revision is None else f"{model.path}@{model.revision}"
        commits = {entry.partition("@")[0]: entry.partition("@")[2] for entry in allowed}
        commit = commits.get(model.path)
        if model.path in (EMBEDDED, OWN):
            is_allowed = model.path == EMBEDDED and EMBEDDED in allowed
        elif has_own_model:  # the site's copy is used, whatever the server names
            is_allowed = commit is not None and model.revision in (None, commit)
        else:
            is_allowed = commit is not None and model.revision == commit
            if commit is not None and model.revision is None:
                raise _refused(
                    f"model.path={model.path} without a commit",
                    "ask for model.revision as in its allowed_models",
                    commit,
                )
        if not is_allowed:
            relation = "it is not among its allowed_models"
            raise _refused(f"model.path={shown(asked)}", relation, ", ".join(allowed))

    def _check_choice(self, name: str, key: str, value: Any) -> None:
        allowed: tuple[str, ...] | None = getattr(self, name)
        if allowed is not None and value not in allowed:
            relation = f"it is not among its {name}"
            raise _refused(f"{key}={shown(value)}", relation, ", ".join(allowed))

    def _check_limit(self, name: str, key: str, value: float) -> None:
        limit: float | None = getattr(self, name)
        if limit is None:
            return
        is_least = name.startswith("min_")
        # "not <=" also refuses NaN.
        if not (value >= limit if is_least else value <= limit):
            relation = f"it is {'below' if is_least else 'above'} its {name}"
            raise _refused(f"{key}={shown(value)}", relation, f"{limit:g}")


def _batch(config: Config) -> int:
    return config.training.batch_size * config.training.gradient_accumulation_steps


_STEP = "training.batch_size x gradient_accumulation_steps"
# Limit -> the key named in a refusal, and the requested value; None: not applicable.
_LIMITS: dict[str, tuple[str, Callable[[Config, int], float | None]]] = {
    "min_records_per_step": (_STEP, lambda config, _: _batch(config)),
    "min_records_per_round": (
        f"training.max_steps x {_STEP.removeprefix('training.')}",
        lambda config, _: (
            config.training.max_steps * _batch(config) if config.training.max_steps > 0 else None
        ),
    ),
    "min_length": ("training.max_length", lambda config, _: config.training.max_length),
    "max_length": ("training.max_length", lambda config, _: config.training.max_length),
    "max_steps": (
        "training.max_steps",
        lambda config, _: config.training.max_steps if config.training.max_steps > 0 else None,
    ),
    "max_epochs": (
        "training.num_epochs",
        lambda config, _: config.training.num_epochs if config.training.max_steps < 1 else None,
    ),
    "max_batch_size": (
        "training.batch_size x gradient_accumulation_steps, or micro_batch_size",
        lambda config, _: max(_batch(config), config.training.micro_batch_size or 0),
    ),
    "max_batch_tokens": (
        "evaluation.batch_tokens",
        lambda config, _: config.evaluation.batch_tokens,
    ),
    "max_rounds": (
        "federation.num_rounds",
        lambda config, round: max(config.federation.num_rounds, round),
    ),
    "max_lora_rank": ("lora.r", lambda config, _: config.lora.r),
    "min_noise_multiplier": (
        "privacy.noise_multiplier",
        lambda config, _: (
            None if config.privacy.unit == "none" else config.privacy.noise_multiplier or 0.0
        ),
    ),
    "max_rounds_kept": (  # rounds of state, so that the server can resume from its checkpoints
        "checkpoint.every x (checkpoint.keep + 1)",
        lambda config, _: min(
            config.checkpoint.every * (config.checkpoint.keep + 1), config.federation.num_rounds
        ),
    ),
}


def _refused(
    asked: str, relation: str, limit: str, remedy: str = "ask within that"
) -> RefusedError:
    return RefusedError(
        f"the site refuses {asked}: {relation} ({limit}); {remedy}, or let the site's operator "
        "change this site's policy.yaml"
    )


def site_policy(node_config: Mapping[str, object]) -> Policy:
    """The policy in the file ``policy-path`` of a site's node config.

    Without this key, for example if a SuperNode was started by hand, the limits are the safe
    defaults, and no run waits for approval because there is no directory for requests.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = node_config.get("policy-path")
    return Policy(approval=AUTOMATIC) if path is None else read_policy(str(path))


def read_policy(path: str | Path) -> Policy:
    """Read ``policy.yaml``; a missing key has its default, and null means no limit.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value has a wrong type.
    """
    import yaml

    file = Path(path).expanduser()
    try:
        text = file.read_text("utf-8")
        node = yaml.compose(text, yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise _wrong(file, f"{reason}; give the site's policy with policy-path") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise _wrong(file, f"not valid YAML{line} ({getattr(error, 'problem', error)})") from None
    if isinstance(node, yaml.MappingNode):  # YAML would silently use the last of two values
        keys = [str(key.value) for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise _wrong(file, f"{shown(repeated[0])} stands twice; keep one")
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise _wrong(file, "must hold lines of the form max_steps: 1000")
    return Policy(**{_known(file, key): _value(file, key, values[key]) for key in values})


def new_policy(assignments: Sequence[str], **values: object) -> dict[str, str]:
    """The values of a new site's ``policy.yaml``: the defaults, `values`, then `assignments`.

    Args:
        assignments: ``key=value`` of ``--policy``, with the value in YAML.

    Raises:
        ConfigError: one does not have this form, a key is unknown, or a value is invalid.
    """
    import yaml

    file = Path("--policy")
    policy: dict[str, object] = {**vars(Policy()), **values}
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if not equals:
            raise ConfigError(f"--policy {shown(assignment)}: write key=value, as max_rounds=50")
        policy[_known(file, key)] = _value(file, key, value)
    return {key: _as_yaml(value) for key, value in policy.items()}


def _as_yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return textwrap.fill(f"[{', '.join(map(str, value))}]", 96, subsequent_indent="  ")
    if isinstance(value, str | bool):
        return str(value).lower()
    return f"{value:.12g}"


def _known(file: Path, key: Any) -> str:
    names = [field.name for field in fields(Policy)]
    if key in names:
        return str(key)
    hint = did_you_mean(key, names)
    raise _wrong(file, f"unknown key {shown(key)!r}.{hint} Known: {', '.join(names)}")


def _value(file: Path, key: str, value: Any) -> Any:
    if value is None and key == "approval":
        return EVERY_RUN
    reader: Callable[[Any], Any] = _READERS.get(key, _whole_number)
    if key not in _RULES and (value is None or (key in _LISTS and value == ANY)):
        return None
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


def _models(value: Any) -> tuple[str, ...]:
    names = _names(value)
    for name in names:
        if name not in (EMBEDDED, OWN) and not _PINNED.fullmatch(name):
            raise ValueError(
                f"names {shown(name)}; give {EMBEDDED}, {OWN} (the directory of model-path) or a "
                "hub id with its commit of 40 digits, as org/model@0e9e39f2...; a name without a "
                "commit can become another model, whose tokenizer or template reads records"
            )
    return names


def _choices(*choices: str) -> Callable[[Any], tuple[str, ...]]:
    def read(value: Any) -> tuple[str, ...]:
        names = _names(value)
        if unknown := [name for name in names if name not in choices]:
            raise ValueError(f"names {shown(unknown[0])}; there are {', '.join(choices)}")
        return names

    return read


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


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


def _promise(value: Any) -> str:
    if value not in (OPTIONAL, REQUIRED, BY_RECORD):
        raise ValueError(f"is unknown; use one of: {OPTIONAL}, {REQUIRED}, {BY_RECORD}")
    return str(value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "privacy": _promise,
    "max_epsilon": _number,
    "min_noise_multiplier": _number,
    "approval": _rule,
    "allowed_models": _models,
    "tasks": lambda value: _choices(*tasks.names())(value),
    "optimizers": _choices(*OPTIMIZERS),
    "target_modules": _names,
    "datasets": _names,
    "max_epochs": _number,
    "max_state_gb": _number,
    "state_days": _number,
    "secret_draws": _truth,
    "only_secure": _truth,
}
_RULES = ("secret_draws", "only_secure", "approval", "privacy")  # which null does not lift
_LISTS = ("allowed_models", "tasks", "optimizers", "target_modules", "datasets")


def _wrong(file: Path, reason: str) -> ConfigError:
    whose = "" if file.name.startswith("--") else "this site's "
    return ConfigError(f"{whose}{file.name}: {reason}.", "its policy file cannot be read")
