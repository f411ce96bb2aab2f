"""What is run: the methods, the settings of their trials, and each run's configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fedllm_flwr.commands.compare.jobs import centralized_like
from fedllm_flwr.config import changed
from fedllm_flwr.config.compose import compose
from fedllm_flwr.config.names import did_you_mean
from fedllm_flwr.config.participation import num_sampled
from fedllm_flwr.config.schema import with_value
from fedllm_flwr.config.validation import validate
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.runs.directory import PlannedRun

_FOLDER = Path(__file__).parents[2] / "assets" / "protocols"
_METHODS = "methods"
SPAN = 4.0  # factor around a method's learning rate within which it is searched
RATE = "training.learning_rate"


@dataclass(frozen=True)
class Protocol:
    """One experiment: its configuration, its test, and published figures to compare with.

    Args:
        experiment: choice of the group ``experiment``.
        tasks: tasks of the suites on which the chosen adapters are tested; empty: the records of
            ``data.test_path``, scored as held-out records are.
        start: experiment whose adapter every run starts from, and which DPO takes as reference.
        published: figures by others, see `document.published_table`.
    """

    name: str
    experiment: str
    tasks: tuple[str, ...] = ()
    start: str | None = None
    published: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Method:
    """An algorithm with what is searched of it, an entry of ``methods.yaml``."""

    name: str
    group: str
    overrides: tuple[str, ...]
    rate: float = 1.0
    second: str | None = None
    low: float = 0.0
    high: float = 0.0

    def setting(self, base: float, trial: int) -> dict[str, float]:
        """Values of the searched keys in trial 0, 1, ...: the points of a Halton sequence.

        The first n trials are the same whatever the number of trials, and their learning rates are
        those of every other method, times `rate` (Bousquet et al. 2017, arXiv 1706.03200).

        Args:
            base: the experiment's learning rate.
        """
        part = _radical_inverse(trial + 1, 2)
        found = {RATE: base * self.rate * SPAN ** (2 * part - 1)}
        if self.second is not None:
            found[self.second] = self.low * (self.high / self.low) ** _radical_inverse(trial + 1, 3)
        return {key: float(f"{value:.3g}") for key, value in found.items()}


@dataclass(frozen=True)
class MethodRun(PlannedRun):
    """One run: a method with the setting of a trial, and a seed."""

    method: str
    trial: int
    seed: int
    setting: dict[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of all clients in all rounds; None if the data decide on them."""
        config = self.config
        clients = config.federation.num_clients
        if clients is None or config.training.max_steps < 0:
            return None
        per_round = num_sampled(config, clients) * config.training.max_steps
        return config.federation.num_rounds * per_round


def protocols() -> list[str]:
    """Names of the experiments."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml") if file.stem != _METHODS)


def read_protocol(name: str) -> Protocol:
    """The experiment of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in protocols():
        hint = did_you_mean(name, protocols()) or f" Choose from {', '.join(protocols())}."
        raise ConfigError(f"reproduce {name}: no such experiment.{hint}")
    values: dict[str, Any] = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    lists = {key: tuple(values.get(key, ())) for key in ("tasks", "published")}
    return Protocol(**{"name": name, **values, **lists})


@cache
def all_methods() -> dict[str, Method]:
    """Every method by name, in the order of tables."""
    values = yaml.safe_load((_FOLDER / f"{_METHODS}.yaml").read_text(encoding="utf-8"))
    return {
        name: Method(name, **{**item, "overrides": tuple(item["overrides"])})
        for name, item in values.items()
    }


def chosen_methods(names: Sequence[str]) -> list[Method]:
    """Methods by name or group, in the order of tables.

    Raises:
        ConfigError: a name is neither.
    """
    methods = all_methods()
    groups = {method.group for method in methods.values()}
    for name in names:
        if name not in methods and name not in groups:
            known = [*sorted(groups), *methods]
            hint = did_you_mean(name, known) or f" Choose from {', '.join(known)}."
            raise ConfigError(f"--methods {name}: no such method or group of methods.{hint}")
    return [method for name, method in methods.items() if {name, method.group} & set(names)]


def planned(
    method: Method,
    trial: int,
    seed: int | None,
    overrides: Sequence[str],
    root: Path,
    config_dir: str | None = None,
) -> MethodRun:
    """The run of a method with the setting of a trial.

    Args:
        seed: None: that of the experiment.
        overrides: of every run, the experiment's choice among them.

    Raises:
        ConfigError: the configuration is invalid.
    """
    config = compose([*overrides, *method.overrides], config_dir)
    if config.algorithm.name == "centralized":
        federated = compose([*overrides, "algorithm=fedavg"], config_dir)
        config = centralized_like(federated, config.algorithm)
    base = config.training.learning_rate
    setting = method.setting(base, trial)
    ratio = setting[RATE] / base
    low = float(f"{config.training.min_learning_rate * ratio:.3g}")
    config = changed(config, training={"min_learning_rate": low})
    for key, value in setting.items():
        config = with_value(config, key, value)
    seed = config.seed if seed is None else seed
    config = replace(
        changed(
            config,
            federation={"engine": "inprocess"},
            evaluation={"central": True},
            tracking={"figures": False, "report": False},
        ),
        seed=seed,
        output_dir=str(root / "runs" / f"{method.name}-{trial}-seed{seed}"),
    )
    validate(config)
    return MethodRun(method.name, trial, seed, setting, config=config)


def _radical_inverse(number: int, base: int) -> float:
    """`number` in `base` with its digits mirrored at the point (van der Corput): in (0, 1)."""
    value, scale = 0.0, 1.0
    while number:
        scale /= base
        number, digit = divmod(number, base)
        value += digit * scale
    return value
