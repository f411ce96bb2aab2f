"""Registries of named parts of this package and of installed plug-ins.

A package adds its own through an entry point of the registry's group, for example in its
``pyproject.toml``::

    [project.entry-points."fedllm_flwr.algorithms"]
    feddyn = "fedllm_feddyn.rule:FedDyn"

A configuration, including one from a server, can only name parts that are installed locally.
"""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from fedllm_flwr.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """Maps the values of a configuration key to parts.

    Args:
        key: the configuration key, for messages.
        group: group of entry points under which other packages add names.
        builtin: name -> ``module:attribute`` of this package's parts, imported at first use.
    """

    key: str
    group: str
    builtin: Mapping[str, str]

    def names(self) -> list[str]:
        """All valid names, this package's first."""
        return [*self.builtin, *sorted(_installed(self.group).keys() - self.builtin.keys())]

    def __contains__(self, name: str) -> bool:
        """Whether `name` is valid; checks installed packages only if it is not built in."""
        return name in self.builtin or name in _installed(self.group)

    def check(self, name: str) -> None:
        """Reject an unknown name, without importing anything.

        Raises:
            ConfigError: lists the known names.
        """
        if name in self:
            return
        raise ConfigError(f"{self.key}={name} is unknown; choose one of {', '.join(self.names())}.")

    def find(self, name: str) -> T:
        """The part called `name`.

        Raises:
            ConfigError: the name is unknown, or the package that adds it is broken.
        """
        self.check(name)
        if name in self.builtin:
            return cast(T, pkgutil.resolve_name(self.builtin[name]))
        entry = _installed(self.group)[name]
        try:
            return cast(T, entry.load())
        except Exception as error:  # another package can raise anything
            package = entry.dist.name if entry.dist else entry.value
            raise ConfigError(
                f"{self.key}={name}: the package {package} that adds it cannot be loaded "
                f"({type(error).__name__}: {error})."
            ) from error


CONF_GROUP = "fedllm_flwr.conf"
"""Entry points that name a package with groups of YAML files, like ``conf/`` of this package."""


@cache
def plugin_folders(group: str) -> tuple[Path, ...]:
    """Folders of the packages named by the entry points of a group, without importing them."""
    specs = (find_spec(entry.value) for _, entry in sorted(_installed(group).items()))
    return tuple(
        Path(place) for spec in specs if spec for place in spec.submodule_search_locations or ()
    )


@cache
def _installed(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}


_ALGORITHMS = "fedllm_flwr.federation.algorithms"
ALGORITHMS: Registry[Any] = Registry(
    "algorithm",
    "fedllm_flwr.algorithms",
    {
        "fedavg": f"{_ALGORITHMS}.fedavg:FedAvg",
        "fedprox": f"{_ALGORITHMS}.fedprox:FedProx",
        "scaffold": f"{_ALGORITHMS}.scaffold:Scaffold",
        "fedavgm": f"{_ALGORITHMS}.fedavgm:FedAvgM",
        "fedadagrad": f"{_ALGORITHMS}.fedadagrad:FedAdagrad",
        "fedyogi": f"{_ALGORITHMS}.fedyogi:FedYogi",
        "fedadam": f"{_ALGORITHMS}.fedadam:FedAdam",
        "ffa": f"{_ALGORITHMS}.ffa:FFA",
        "rolora": f"{_ALGORITHMS}.rolora:RoLoRA",
        "lora_fair": f"{_ALGORITHMS}.lora_fair:LoRAFair",
        "fedex": f"{_ALGORITHMS}.fedex:FedEx",
        "flexlora": f"{_ALGORITHMS}.flexlora:FlexLoRA",
        "hetlora": f"{_ALGORITHMS}.hetlora:HetLoRA",
        "flora": f"{_ALGORITHMS}.flora:FLoRA",
        "fedsa": f"{_ALGORITHMS}.fedsa:FedSA",
        "fed_sb": f"{_ALGORITHMS}.fed_sb:FedSB",
        "ditto": f"{_ALGORITHMS}.ditto:Ditto",
        "local": f"{_ALGORITHMS}.baselines:Local",
        "centralized": f"{_ALGORITHMS}.baselines:Centralized",
    },
)
"""Subclasses of `federation.rule.Rule`."""

_ROBUST = "fedllm_flwr.federation.robust"
COMBINERS: Registry[Any] = Registry(
    "algorithm.combiner",
    "fedllm_flwr.combiners",
    {
        "mean": "fedllm_flwr.federation.combine:WeightedMean",
        "median": f"{_ROBUST}:Median",
        "trimmed_mean": f"{_ROBUST}:TrimmedMean",
        "krum": f"{_ROBUST}:Krum",
        "geometric_median": f"{_ROBUST}:GeometricMedian",
        "norm_bound": f"{_ROBUST}:NormBound",
        "centred_clip": f"{_ROBUST}:CentredClip",
    },
)
"""Subclasses of `federation.combine.Combiner`."""

_COMPRESS = "fedllm_flwr.federation.updates.compress"
TRANSFORMS: Registry[Any] = Registry(
    "communication.transforms",
    "fedllm_flwr.transforms",
    {
        "clip": "fedllm_flwr.federation.updates.clip:Clip",
        "int8": f"{_COMPRESS}:Int8",
        "int4": f"{_COMPRESS}:Int4",
        "top_k": f"{_COMPRESS}:TopK",
    },
)
"""Subclasses of `federation.updates.UpdateTransform`."""

TASKS: Registry[Any] = Registry(
    "task",
    "fedllm_flwr.tasks",
    {
        "sft": "fedllm_flwr.tasks.sft:Sft",
        "dpo": "fedllm_flwr.tasks.dpo:Dpo",
        "kto": "fedllm_flwr.tasks.kto:Kto",
    },
)
"""Subclasses of `tasks.base.TrainingTask`."""

TEMPLATES: Registry[Any] = Registry(
    "data.template",
    "fedllm_flwr.templates",
    {
        "alpaca": "fedllm_flwr.data.templates:ALPACA",
        "vicuna": "fedllm_flwr.data.templates:VICUNA",
        "chat": "fedllm_flwr.data.templates:CHAT",
    },
)
"""Instances of `data.templates.TextTemplate`; ``chat`` is the tokenizer's own template."""

_PREPROCESSING = "fedllm_flwr.data.preprocessing"
PREPROCESSING: Registry[Any] = Registry(
    "data.preprocessing",
    "fedllm_flwr.preprocessing",
    {
        "none": f"{_PREPROCESSING}:keep",
        "alpaca": f"{_PREPROCESSING}:keep",
        "fingpt": f"{_PREPROCESSING}:parse_fingpt",
        "medalpaca": f"{_PREPROCESSING}:drop_instruction",
        "mathinstruct": f"{_PREPROCESSING}:drop_duplicates",
        "hh_rlhf": f"{_PREPROCESSING}:parse_transcripts",
    },
)
"""Functions of type `data.preprocessing.Preprocessing`. A data set is one of them, or ``none``, and
a choice of the configuration group ``data`` that names it (`CONF_GROUP`)."""
