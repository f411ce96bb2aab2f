"""Checks of single values and of combinations, before anything expensive starts."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedllm_flwr.config.schema import Config
from fedllm_flwr.errors import ConfigError

ALGORITHMS = (
    "fedavg",
    "fedprox",
    "scaffold",
    "fedavgm",
    "fedadagrad",
    "fedyogi",
    "fedadam",
    "local",
    "centralized",
)

_CHOICES: dict[str, tuple[str, ...]] = {
    "model.attention": ("auto", "eager", "sdpa", "flash_attention_2"),
    "quantization.name": ("none", "int8", "nf4"),
    "quantization.compute_dtype": ("auto", "float32", "bfloat16", "float16"),
    "data.template": ("alpaca", "vicuna", "chat"),
    "data.truncation": ("right", "left", "drop"),
    "data.on_bad_record": ("error", "skip"),
    "task.name": ("sft",),
    "training.optimizer": ("adamw", "sgd"),
    "training.dtype": ("auto", "float32", "bfloat16", "float16"),
    "training.device": ("auto", "cpu", "cuda", "mps"),
    "algorithm.name": ALGORITHMS,
    "algorithm.variant": ("paper", "openfedllm"),
    "algorithm.weighting": ("auto", "examples", "uniform"),
    "partition.name": ("iid", "dirichlet", "natural", "pathological", "size"),
    "federation.engine": ("ray", "inprocess"),
    "communication.dtype": ("float32", "bfloat16", "float16"),
}

_Rule = tuple[Callable[[Any], bool], str]


def _positive(value: float) -> bool:
    return value > 0


def _non_negative(value: float) -> bool:
    return value >= 0


def _fraction(value: float) -> bool:
    return 0 <= value < 1


_RANGES: dict[str, _Rule] = {
    "lora.r": (_positive, "> 0"),
    "lora.alpha": (_positive, "> 0"),
    "lora.dropout": (_fraction, "in [0, 1)"),
    "data.max_samples": (_positive, "> 0"),
    "data.eval_max_samples": (_positive, "> 0"),
    "data.validation_fraction": (_fraction, "in [0, 1)"),
    "training.learning_rate": (_positive, "> 0"),
    "training.min_learning_rate": (_non_negative, ">= 0"),
    "training.num_epochs": (_positive, "> 0"),
    "training.batch_size": (_positive, "> 0"),
    "training.gradient_accumulation_steps": (_positive, "> 0"),
    "training.micro_batch_size": (_positive, "> 0"),
    "training.max_length": (_positive, "> 0"),
    "training.weight_decay": (_non_negative, ">= 0"),
    "training.max_grad_norm": (_non_negative, ">= 0 (0 turns clipping off)"),
    "algorithm.mu": (_non_negative, ">= 0"),
    "algorithm.eta": (_positive, "> 0"),
    "algorithm.beta1": (_fraction, "in [0, 1)"),
    "algorithm.beta2": (_fraction, "in [0, 1)"),
    "algorithm.tau": (_positive, "> 0"),
    "partition.alpha": (_positive, "> 0"),
    "partition.classes_per_client": (_positive, "> 0"),
    "partition.min_size": (_positive, "> 0"),
    "federation.num_clients": (_positive, "> 0"),
    "federation.sample_clients": (_positive, "> 0"),
    "federation.sample_fraction": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "federation.num_rounds": (_positive, "> 0"),
    "federation.min_replies": (_positive, "> 0"),
    "federation.round_timeout_s": (_positive, "> 0"),
    "federation.start_timeout_s": (_positive, "> 0"),
    "federation.client_cpus": (_positive, "> 0"),
    "federation.client_gpus": (_non_negative, ">= 0"),
    "checkpoint.every": (_positive, "> 0"),
    "checkpoint.keep": (_positive, "> 0"),
    "evaluation.every": (_non_negative, ">= 0 (0: only at the start and at the end)"),
    "evaluation.batch_tokens": (_positive, "> 0"),
    "seed": (_non_negative, ">= 0"),
}


def validate(config: Config) -> None:
    """Check every value and combination that needs no file and no model.

    Raises:
        ConfigError: names the key, its value and what to use instead.
    """
    for key, choices in _CHOICES.items():
        _check_choice(key, _value(config, key), choices)
    for key, (holds, wanted) in _RANGES.items():
        value = _value(config, key)
        if value is not None and not holds(value):
            raise ConfigError(f"{key} must be {wanted}, got {value}.")
    _check_training(config)
    _check_federation(config)
    _check_model(config)


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{key}={value}: choose from {', '.join(choices)}.{hint}")


def _check_training(config: Config) -> None:
    training = config.training
    if training.min_learning_rate > training.learning_rate:
        raise ConfigError(
            f"training.min_learning_rate={training.min_learning_rate} is above "
            f"training.learning_rate={training.learning_rate}; lower it."
        )
    if training.max_steps < 1 and training.max_steps != -1:
        raise ConfigError(
            f"training.max_steps must be >= 1, or -1 to train training.num_epochs, "
            f"got {training.max_steps}."
        )
    micro = training.micro_batch_size
    if micro is not None and training.batch_size % micro:
        raise ConfigError(
            f"training.batch_size={training.batch_size} is not a multiple of "
            f"training.micro_batch_size={micro}."
        )


def _check_federation(config: Config) -> None:
    federation = config.federation
    clients, sampled = federation.num_clients, federation.sample_clients
    if clients is not None and sampled is not None and sampled > clients:
        raise ConfigError(
            f"federation.sample_clients={sampled} exceeds federation.num_clients={clients}; "
            "sample at most all of them."
        )
    if clients is not None:
        per_round = sampled or max(1, round(federation.sample_fraction * clients))
        if federation.min_replies > per_round:
            raise ConfigError(
                f"federation.min_replies={federation.min_replies} exceeds the {per_round} clients "
                "sampled per round; lower it or sample more clients."
            )
    if config.partition.name == "natural" and not config.partition.column:
        raise ConfigError(
            "partition=natural needs a column: give partition.column=<column>, one client for "
            "each of its values."
        )
    needs_label = config.partition.name in ("dirichlet", "pathological")
    if needs_label and not config.partition.column:
        raise ConfigError(
            f"partition={config.partition.name} needs a column of classes: give "
            "partition.column=<column> (or data.columns.label)."
        )


def _check_model(config: Config) -> None:
    targets = config.lora.target_modules
    named = isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)
    if not named and targets not in ("auto", "all-linear"):
        raise ConfigError(
            f"lora.target_modules={targets}: give auto, all-linear or a list of module names "
            "such as [q_proj,v_proj]."
        )
    if config.model.path == "embedded" and config.model.name != "tiny":
        raise ConfigError(f"model={config.model.name} needs model.path=<hub id or directory>.")


def validate_paths(config: Config) -> None:
    """Check the files that the configuration names on this machine.

    Raises:
        ConfigError: names the key and the path that is missing.
    """
    if not config.data.path and not config.data.hub_id:
        raise ConfigError(f"data={config.data.name} needs data.path=<file or directory>.")
    files = {"data.path": config.data.path, "data.eval_path": config.data.eval_path}
    for key, path in files.items():
        if path and path != "embedded" and not Path(path).expanduser().exists():
            raise ConfigError(f"{key}={path}: no such file or directory.")
    if config.init_adapter and not (Path(config.init_adapter) / "adapter_config.json").is_file():
        raise ConfigError(
            f"init_adapter={config.init_adapter}: no adapter_config.json there; give the adapter/ "
            "directory of a run."
        )
