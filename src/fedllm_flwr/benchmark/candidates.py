"""The models to compare: a base model, and adapters of runs, of directories, of a comparison."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedllm_flwr.alone import AloneAdapters
from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import load_run
from fedllm_flwr.config.schema import LoraConfig, ModelConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.run_directory import RunDirectory
from fedllm_flwr.training.tokenizer import model_source

BASE = "base"


@dataclass(frozen=True)
class Candidate:
    """One model: the base of `config`, with the adapter in a directory, or as it is.

    Args:
        row: what its line in the tables is called; several candidates of a row are averaged.
        seed, client: which of them this is, where a row has several.
    """

    row: str
    config: Config
    adapter: Path | None = None
    seed: int | None = None
    client: str | None = None

    @property
    def name(self) -> str:
        """A name of its own."""
        parts = [self.row, "" if self.seed is None else f"seed {self.seed}", self.client or ""]
        return ", ".join(part for part in parts if part)


def collect(
    runs: Sequence[str],
    adapters: Sequence[str],
    compare: str | None,
    base: str | None,
    template: str | None,
) -> list[Candidate]:
    """The base model, then every adapter that was asked for.

    Raises:
        ConfigError: a directory holds no finished run or adapter, or bases differ.
    """
    found = [*_of_runs(runs), *(_of_adapter(path, base) for path in adapters)]
    if compare is not None:
        found += _of_comparison(Path(compare).expanduser())
    if not found:
        if base is None:
            raise ConfigError("give what to evaluate: --run, --adapter, --compare or --base.")
        found = [Candidate(BASE, Config(model=_base_model(base)))]
    if template is not None:
        found = [_with_template(item, template) for item in found]
    first = found[0]
    for other in found[1:]:
        _require_same_base(first, other)
    rest = [item for item in found if item.adapter is not None]
    return [Candidate(BASE, first.config), *rest]


def _of_runs(paths: Sequence[str]) -> list[Candidate]:
    """Runs by the name of their algorithm where that tells them apart, else of their directory."""
    loaded = [(Path(path).expanduser(), path) for path in paths]
    configs = [(path, load_run(path, f"--run {typed}")) for path, typed in loaded]
    names = [config.algorithm.name for _, config in configs]
    distinct = len(set(names)) == len(names)
    found = []
    for path, config in configs:
        row = config.algorithm.name if distinct else path.resolve().name
        found += _of_run(RunDirectory(path), config, row)
    return found


def _of_run(
    directory: RunDirectory, config: Config, row: str, seed: int | None = None
) -> list[Candidate]:
    """A run's adapter; those of all clients where each trained alone."""
    if directory.adapters.is_dir():
        folders = sorted(folder for folder in directory.adapters.iterdir() if folder.is_dir())
        return [
            Candidate(row, config, folder, seed, AloneAdapters.name_of(folder.name))
            for folder in folders
        ]
    if not directory.adapter.is_dir():
        raise ConfigError(
            f"--run {directory.path}: no adapter there, the run has not finished; go on with it: "
            f"fedllm run resume={directory.path}"
        )
    return [Candidate(row, config, directory.adapter, seed)]


def _of_comparison(root: Path) -> list[Candidate]:
    """All finished runs of a comparison, algorithms as rows, in the comparison's own order."""
    from fedllm_flwr.comparison.command import ORDER

    if not (root / "compare.json").is_file():
        raise ConfigError(f"--compare {root}: no compare.json; give the directory of a comparison.")
    finished = [RunDirectory(path) for path in sorted((root / "runs").iterdir())]
    finished = [run for run in finished if run.summary.is_file()]
    if not finished:
        raise ConfigError(f"--compare {root}: no run has finished yet.")
    configs = {run.path: load_run(run.path, str(run.path)) for run in finished}
    finished.sort(
        key=lambda run: (ORDER.index(configs[run.path].algorithm.name), configs[run.path].seed)
    )
    return [
        candidate
        for run in finished
        for candidate in _of_run(
            run, configs[run.path], configs[run.path].algorithm.name, configs[run.path].seed
        )
    ]


def _of_adapter(typed: str, base: str | None) -> Candidate:
    """An adapter directory as PEFT writes it; a run's own keeps the run's settings."""
    path = Path(typed).expanduser()
    try:
        saved: dict[str, Any] = json.loads((path / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"--adapter {typed}: no readable adapter_config.json; give an adapter's directory."
        ) from None
    row = path.resolve().name
    run = next((p for p in path.resolve().parents[:2] if (p / "config.yaml").is_file()), None)
    if run is not None and base is None:
        return Candidate(run.name if row == "adapter" else row, load_run(run, str(run)), path)
    source = base or saved.get("base_model_name_or_path")
    if not source:
        raise ConfigError(f"--adapter {typed}: it names no base model; add --base <model>.")
    targets = saved.get("target_modules")
    lora = LoraConfig(
        r=saved["r"],
        alpha=saved["lora_alpha"],
        target_modules=sorted(targets) if isinstance(targets, list) else targets,
        rslora=bool(saved.get("use_rslora")),
        dora=bool(saved.get("use_dora")),
    )
    return Candidate(row, Config(model=_base_model(source), lora=lora), path)


def _base_model(path: str) -> ModelConfig:
    name = "tiny" if path == "embedded" else "custom"
    model = ModelConfig(name=name, path=path)
    model_source(model)
    return model


def _with_template(candidate: Candidate, template: str) -> Candidate:
    config = candidate.config
    return replace(candidate, config=replace(config, data=replace(config.data, template=template)))


def _require_same_base(one: Candidate, other: Candidate) -> None:
    """All in one call share the base model, so that it is loaded once and scored once."""

    def shown(config: Config) -> str:
        return f"{config.model.path} ({config.quantization.name})"

    same = (
        model_source(one.config.model) == model_source(other.config.model)
        and one.config.model.revision == other.config.model.revision
        and one.config.quantization == other.config.quantization
    )
    if not same:
        raise ConfigError(
            f"{other.name} has another base model, {shown(other.config)}, than {one.name}, "
            f"{shown(one.config)}; evaluate them in two calls."
        )
    if one.config.data.template != other.config.data.template:
        raise ConfigError(
            f"{other.name} was trained with data.template={other.config.data.template}, {one.name} "
            f"with {one.config.data.template}; give --template, or evaluate them in two calls."
        )
