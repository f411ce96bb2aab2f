"""The models to evaluate: a base model, and adapters of runs, directories or a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.compose import load_run
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.tokenizer import model_source
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.kept_adapters import KeptAdapter, base_model, find_adapter, find_adapters

BASE = "base"


@dataclass(frozen=True)
class Candidate:
    """One model: the base model of `config`, with or without an adapter from disk.

    Args:
        row: name of its row in the tables; the candidates of a row are averaged.
        seed, client: identify the candidate within its row.
    """

    row: str
    config: Config
    adapter: KeptAdapter | None = None
    seed: int | None = None
    client: str | None = None

    @property
    def name(self) -> str:
        """The candidate's unique name."""
        parts = [self.row, "" if self.seed is None else f"seed {self.seed}", self.client or ""]
        return ", ".join(part for part in parts if part)


def collect(
    runs: Sequence[str],
    adapters: Sequence[str],
    compare: str | None,
    base: str | None,
    template: str | None,
) -> list[Candidate]:
    """The base model and all requested adapters.

    Raises:
        ConfigError: a directory contains no finished run or adapter, or base models differ.
    """
    found = _of_runs(runs)
    for typed in adapters:
        kept = find_adapter(typed, base)
        row = kept.label if kept.run is None else _row(kept, kept.run.resolve().name)
        found += _candidates(row, [kept])
    if compare is not None:
        found += _of_comparison(Path(compare).expanduser())
    if not found:
        if base is None:
            raise ConfigError("give a model to evaluate: --run, --adapter, --compare or --base.")
        found = [Candidate(BASE, Config(model=base_model(base)))]
    if template is not None:
        data = {"template": template}
        found = [replace(item, config=changed(item.config, data=data)) for item in found]
    first = found[0]
    for other in found[1:]:
        _require_same_base(first, other)
    rest = [item for item in found if item.adapter is not None]
    return [Candidate(BASE, first.config), *rest]


def _of_runs(typed: Sequence[str]) -> list[Candidate]:
    """Candidates of runs, named after their algorithms or, if these repeat, directories."""
    found = [find_adapters(text) for text in typed]
    rows = [_row(some[0], some[0].config.algorithm.name) for some in found]
    if len(set(rows)) < len(rows):
        rows = [_row(some[0], str(some[0].run and some[0].run.resolve().name)) for some in found]
    return [item for row, some in zip(rows, found, strict=True) for item in _candidates(row, some)]


def _row(kept: KeptAdapter, name: str) -> str:
    """The row of a run's adapter: `name`, with a suffix unless it is the final adapter."""
    return name if kept.label == "final" else f"{name}, {kept.label}"


def _candidates(row: str, found: Sequence[KeptAdapter], seed: int | None = None) -> list[Candidate]:
    return [Candidate(row, kept.config, kept, seed, kept.client) for kept in found]


def _of_comparison(root: Path) -> list[Candidate]:
    """All finished runs of a comparison, with a row per algorithm in the comparison's order."""
    from fedllm_flwr.commands.compare.command import ORDER

    if not (root / "compare.json").is_file():
        raise ConfigError(f"--compare {root}: no compare.json; give a comparison's directory.")
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
        for candidate in _candidates(
            configs[run.path].algorithm.name,
            find_adapters(str(run.path)),
            configs[run.path].seed,
        )
    ]


def _require_same_base(one: Candidate, other: Candidate) -> None:
    """Check that two candidates have the same base model, which is loaded and scored only once."""

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
            f"{shown(one.config)}; evaluate them separately."
        )
    if one.config.data.template != other.config.data.template:
        raise ConfigError(
            f"{other.name} was trained with data.template={other.config.data.template}, {one.name} "
            f"with {one.config.data.template}; give --template, or evaluate them separately."
        )
