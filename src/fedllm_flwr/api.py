"""Python API: the functions of the command line, for notebooks and scripts.

    import fedllm_flwr as fed

    run = fed.run("algorithm=scaffold", "federation.num_rounds=5", data=records)
    run.metrics                      # pandas, a row per round
    model = run.model()              # PEFT's model on its base, ready to generate

Overrides are those of the command line, and results are the same directories that the commands
write, so a run started here can be resumed there and vice versa. Importing the package is cheap:
functions import what they need when they are called.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.errors import ConfigError, DataError, FederationError

if TYPE_CHECKING:
    import datasets
    import pandas
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from fedllm_flwr.config import Config
    from fedllm_flwr.models.adapted_model import AdaptedModel

Records: TypeAlias = (
    "str | os.PathLike[str] | datasets.Dataset | pandas.DataFrame | Iterable[Mapping[str, Any]]"
)
"""A path, a data set of the datasets library, a data frame, or dicts."""

OnRound = Callable[[dict[str, Any]], object]
"""Callback after each round, called with its record, a line of ``metrics.jsonl``."""

_CLIENT = "client"  # column with the client's name, if records are given by client


@dataclass(frozen=True)
class Run:
    """A run, given by its directory; it need not have finished.

    Raises:
        ConfigError: `path` contains no run.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).expanduser())
        if not (self.path / "config.yaml").is_file():
            raise ConfigError(f"{self.path}: holds no run (no config.yaml).")

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        from fedllm_flwr.config.compose import load_run

        return load_run(self.path, str(self.path))

    @property
    def records(self) -> list[dict[str, Any]]:
        """The round records of ``metrics.jsonl``; round 0 is before training."""
        from fedllm_flwr.reporting.metrics import read_metrics

        return read_metrics(self.path / "metrics.jsonl")

    @property
    def summary(self) -> dict[str, Any] | None:
        """The content of ``summary.json``; None if the run has not finished."""
        file = self.path / "summary.json"
        return json.loads(file.read_text("utf-8")) if file.is_file() else None

    @property
    def metrics(self) -> pandas.DataFrame:
        """A row per round, with the names of the experiment trackers: ``train/loss``, ..."""
        import pandas

        from fedllm_flwr.reporting.trackers import scalars, totals

        records = self.records
        spent = totals(records)
        rows = [
            {
                "round": record["round"],
                **{k: v for k, v in scalars(record).items() if not k.startswith("client/")},
                **{name: values[place] for name, values in spent.items()},
            }
            for place, record in enumerate(records)
        ]
        return pandas.DataFrame(rows).set_index("round")

    @property
    def clients(self) -> pandas.DataFrame:
        """A row per round and sampled client: its metrics, or the reason of its ``failure``."""
        import pandas

        rows: list[dict[str, Any]] = []
        for record in self.records:
            place = {"round": record["round"]}
            for name, metrics in (record.get("clients") or {}).items():
                rows.append({**place, "client": name, **metrics})
            for name, reason in (record.get("failures") or {}).items():
                rows.append({**place, "client": name, "failure": reason})
        frame = pandas.DataFrame(rows, columns=None if rows else ["round", "client"])
        return frame.set_index(["round", "client"]).sort_index()

    def model(self, which: str = "final") -> PeftModel:
        """The base model with an adapter of the run, in evaluation mode.

        Args:
            which: ``final``, ``best``, ``round=8`` or ``client=NAME``, as after ``@`` on the
                command line.

        Raises:
            ConfigError: the run does not have this adapter.
        """
        return self._loaded(which)[0].peft

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the base model."""
        from fedllm_flwr.models.tokenizer import load_tokenizer

        tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.config.model)
        return tokenizer

    def generate(
        self, prompts: str | Sequence[str], which: str = "final", max_new_tokens: int = 64
    ) -> list[str]:
        """Greedy answers to prompts, which are formatted with the training template."""
        from fedllm_flwr.data.encode import encode_prompts
        from fedllm_flwr.models.generation import Decoding, as_text, generate

        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        adapted, config = self._loaded(which)
        messages = [[{"role": "user", "content": text}] for text in texts]
        length, template = config.training.max_length, config.data.template
        tokens = encode_prompts(messages, adapted.tokenizer, template, length)
        answers = generate(adapted, tokens, Decoding(max_new_tokens))
        return [as_text(adapted, answer) for answer in answers]

    def resume(self, *overrides: str, on_round: OnRound | None = None, quiet: bool = False) -> Run:
        """Resume an interrupted run, or extend a run: ``federation.num_rounds=20``."""
        return run(f"resume={self.path}", *overrides, on_round=on_round, quiet=quiet)

    def _loaded(self, which: str) -> tuple[AdaptedModel, Config]:
        from fedllm_flwr.models.adapted_model import load_beside
        from fedllm_flwr.runs.adapter_files import load_kept
        from fedllm_flwr.runs.kept_adapters import find_adapter

        prepare_environment()
        kept = find_adapter(f"{self.path}@{which}")
        adapted = load_beside(kept.config)
        adapted.load(load_kept(kept, adapted))
        adapted.peft.eval()
        return adapted, kept.config


@dataclass(frozen=True)
class Comparison:
    """A comparison of algorithms over seeds, given by its directory."""

    path: Path

    @property
    def table(self) -> pandas.DataFrame:
        """A row per algorithm: means and standard deviations over seeds, as in ``compare.csv``."""
        import pandas

        return pandas.read_csv(self.path / "compare.csv").set_index("name")

    @property
    def runs(self) -> dict[str, Run]:
        """The started runs, by directory name."""
        return {file.parent.name: Run(file.parent) for file in self.path.glob("*/config.yaml")}


@dataclass(frozen=True)
class Evaluation:
    """The scores of one ``evaluate``, given by its directory."""

    path: Path

    @property
    def table(self) -> pandas.DataFrame:
        """A row per model, task and metric, as in ``results.csv``."""
        import pandas

        return pandas.read_csv(self.path / "results.csv")

    @property
    def samples(self) -> pandas.DataFrame:
        """A row per model, task and example: question, answer, target and scores."""
        import pandas

        frames = [
            pandas.read_json(file, lines=True).assign(model=file.parent.name, task=file.stem)
            for file in sorted(self.path.glob("predictions/*/*.jsonl"))
        ]
        return pandas.concat(frames, ignore_index=True)


def run(
    *overrides: str,
    data: Records | Mapping[str, Records] | None = None,
    eval_data: Records | None = None,
    on_round: OnRound | None = None,
    config_dir: str | None = None,
    quiet: bool = False,
) -> Run:
    """Train, as ``fedllm run`` does.

    Args:
        overrides: as on the command line, such as ``"algorithm=scaffold"``.
        data: training records; a dict contains the records of each client by name. The roles of
            the columns are set by ``data.columns.*``, and the partition of one data set into
            clients by ``partition``.
        eval_data: held-out records for the central evaluation.
        on_round: called after each round; if it raises, the run ends and can be resumed.
        quiet: print nothing.

    Raises:
        FedLLMError: one line with the problem and its remedy.
        RunInterrupted: the user stopped the run (a KeyboardInterrupt); says how to resume it.
    """
    started = time.monotonic()
    prepare_environment()
    from fedllm_flwr.config.compose import compose
    from fedllm_flwr.reporting.console import Console

    config = compose([*overrides, *_data_overrides(data, eval_data)], config_dir)
    from fedllm_flwr.server.run import run_simulation

    class Following(Console):
        def round(self, record: dict[str, Any], eta_s: float | None = None) -> None:
            super().round(record, eta_s)
            if on_round is not None:
                on_round(record)

    with Following(quiet=quiet) as console:
        return Run(run_simulation(config, console, started).path)


def compare(
    *overrides: str,
    algorithms: Sequence[str] = (),
    seeds: int = 3,
    data: Records | Mapping[str, Records] | None = None,
    eval_data: Records | None = None,
    config_dir: str | None = None,
) -> Comparison:
    """Train with each algorithm and each seed, as ``fedllm compare`` does.

    Args:
        algorithms: names of algorithms and baselines; empty: all.
        data, eval_data: as in `run`.

    Raises:
        FedLLMError: one line with the problem, or that runs have failed.
    """
    prepare_environment()
    from fedllm_flwr.commands.compare.command import compare as compared

    own = [f"algorithm={','.join(algorithms) or 'all'}", f"seeds={seeds}"]
    arguments = [*own, *overrides, *_data_overrides(data, eval_data)]
    root, failed = compared(arguments, config_dir)
    if failed:
        raise FederationError(f"{failed} runs have failed; resume with: resume={root}.")
    return Comparison(root)


def evaluate(
    *runs: Run | Comparison | str | os.PathLike[str],
    suites: Sequence[str] = (),
    tasks: Sequence[str] = (),
    limit: int | None = None,
    subset: int | None = None,
    data_root: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Score runs and their base model on benchmark suites, as ``fedllm evaluate`` does.

    Args:
        runs: runs, one comparison, or names of adapters as on the command line.
        suites, tasks: names, see ``fedllm evaluate --list``.
        limit: maximum number of examples of each part of a task, from the first on; None: all.
        subset: number of examples of each part of a task, drawn at random; None: all.
        data_root: folder of the suites' local files; None: use the hub.

    Raises:
        FedLLMError: one line with the problem, before a model is loaded.
    """
    prepare_environment()
    from fedllm_flwr.commands.evaluate.command import EvaluateOptions
    from fedllm_flwr.commands.evaluate.command import evaluate as evaluated
    from fedllm_flwr.evaluation.suites.options import RunOptions

    comparisons = [item for item in runs if isinstance(item, Comparison)]
    if len(comparisons) > 1 or (comparisons and len(runs) > 1):
        raise ConfigError("evaluate takes runs, or one comparison.")
    root = None if data_root is None else Path(data_root).expanduser()
    request = EvaluateOptions(
        runs=[
            str(item.path if isinstance(item, Run) else item) for item in runs if not comparisons
        ],
        compare=str(comparisons[0].path) if comparisons else None,
        suites=list(suites),
        tasks=list(tasks),
        output=None if output is None else str(output),
        options=RunOptions(limit=limit, subset=subset, data_root=root),
    )
    return Evaluation(evaluated(request))


def _data_overrides(
    data: Records | Mapping[str, Records] | None, eval_data: Records | None
) -> Iterator[str]:
    """Write in-memory records to files in the user's cache, and give the overrides that use them.

    Files are named after their content, so the same records are tokenised only once, and a resumed
    run finds them.
    """
    if data is not None:
        yield "data=jsonl"
        if isinstance(data, Mapping):
            yield f"data.path={_written(_of_clients(data))}"
            yield from (f"data.client_column={_CLIENT}", "partition=natural")
        else:
            yield f"data.path={_path(data)}"
    if eval_data is not None:
        yield f"data.eval_path={_path(eval_data)}"


def _of_clients(data: Mapping[str, Records]) -> Iterator[dict[str, Any]]:
    """The records of all clients, with their client's name."""
    for client, records in data.items():
        for record in _rows(records):
            if record.get(_CLIENT, client) != client:
                raise DataError(
                    f"data[{client!r}]: a record has a column {_CLIENT!r} already, with the value "
                    f"{record[_CLIENT]!r}; rename it."
                )
            yield {**record, _CLIENT: client}


def _path(records: Records) -> Path:
    if isinstance(records, str | os.PathLike):
        return Path(records).expanduser().absolute()
    return _written(_rows(records))


def _rows(records: Records) -> Iterator[dict[str, Any]]:
    if isinstance(records, str | os.PathLike):
        from fedllm_flwr.data.record_files import open_records, refuse

        for file in open_records(Path(records)):
            yield from file.read(refuse)
        return
    to_dict: Any = getattr(records, "to_dict", None)
    if hasattr(records, "iloc"):  # a data frame, whose missing values are NaN
        records = to_dict("records")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            raise DataError(f"data, record {number}: {type(record).__name__}, not a dict.")
        yield {str(name): None if value != value else value for name, value in record.items()}


def _written(rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a file of JSON lines to the user's cache, named after its content."""
    from tempfile import NamedTemporaryFile

    from fedllm_flwr.data.remembered import cache_dir

    folder, digest = cache_dir() / "given", sha256()
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("wb", dir=folder) as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, default=_plain).encode() + b"\n"
            digest.update(line)
            file.write(line)
        file.flush()
        if not file.tell():
            raise DataError("data: no records were given.")
        path = folder / f"{digest.hexdigest()[:32]}.jsonl"
        if not path.exists():
            os.link(file.name, path)
    return path


def _plain(value: Any) -> Any:
    """Convert NumPy numbers and arrays to Python values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise DataError(
        f"data: a {type(value).__name__} cannot be written as JSON; give text or numbers."
    )
