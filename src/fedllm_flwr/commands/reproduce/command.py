"""The command: search, seeds, test, and the document of results, resumable at any point."""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedllm_flwr.commands.compare.jobs import carry_out, carry_out_one
from fedllm_flwr.commands.evaluate.candidates import BASE, Candidate
from fedllm_flwr.commands.evaluate.comparison import compare_scores
from fedllm_flwr.commands.evaluate.scorer import Scorer
from fedllm_flwr.commands.evaluate.tables import as_records
from fedllm_flwr.commands.reproduce.document import seed_name, write_document
from fedllm_flwr.commands.reproduce.methods import (
    Method,
    MethodRun,
    Protocol,
    chosen_methods,
    planned,
    read_protocol,
)
from fedllm_flwr.config import changed
from fedllm_flwr.config.compose import compose
from fedllm_flwr.data.federated import has_eval_source
from fedllm_flwr.errors import ConfigError, FedLLMError, RunInterrupted
from fedllm_flwr.evaluation.coding import code_suite
from fedllm_flwr.evaluation.suites.catalogue import SuiteTask, all_suites, chosen_tasks
from fedllm_flwr.evaluation.suites.harness import HarnessTasks
from fedllm_flwr.evaluation.suites.local_data import missing_files
from fedllm_flwr.evaluation.suites.options import CodeOptions, RunOptions
from fedllm_flwr.evaluation.suites.score_cache import SamplesCache, default_cache
from fedllm_flwr.files import write_atomically
from fedllm_flwr.models.device import describe_device, resolve_device
from fedllm_flwr.reporting.console import print_error
from fedllm_flwr.reporting.metrics import best_record, read_metrics
from fedllm_flwr.reporting.text import text_table
from fedllm_flwr.runs.directory import PlannedRun, refuse_other_files
from fedllm_flwr.runs.fit import check_evaluation_fit, first_refusal
from fedllm_flwr.runs.kept_adapters import KeptAdapter, find_adapters

SAVED = "reproduce.json"  # in its directory: the experiment, its test, the overrides of all runs
RESULTS = "results.json"
_TEXTS = "test_texts.jsonl"


@dataclass(frozen=True)
class ReproduceOptions:
    """Options of the command line.

    Args:
        trials: settings that each method is searched over, on the first seed.
        tasks: of the test; empty: the experiment's.
        subset: examples of each part of a task, drawn at random; None: all.
        jobs: runs side by side.
    """

    overrides: list[str] = field(default_factory=list)
    config_dir: str | None = None
    seeds: int = 5
    trials: int = 5
    methods: list[str] = field(default_factory=lambda: ["main", "sgd"])
    tasks: list[str] = field(default_factory=list)
    subset: int | None = None
    data_root: Path | None = None
    allow_code_execution: bool = False
    jobs: int = 1
    plan: bool = False


@dataclass(frozen=True)
class _Study:
    """An experiment with the options and the directory of this reproduction."""

    protocol: Protocol
    options: ReproduceOptions
    root: Path
    methods: list[Method]
    tasks: list[SuiteTask]
    overrides: list[str]

    def run(self, method: Method, trial: int, seed: int | None = None) -> MethodRun:
        """A method's run with the setting of a trial, by default with the first seed."""
        config_dir = self.options.config_dir
        return planned(method, trial, seed, self.overrides, self.root, config_dir)

    @property
    def run_options(self) -> RunOptions:
        """Options of the test."""
        code = CodeOptions(allow_code_execution=self.options.allow_code_execution)
        return RunOptions(subset=self.options.subset, data_root=self.options.data_root, code=code)


def reproduce(name: str, options: ReproduceOptions) -> int:
    """Carry out what is missing of an experiment, and write its document; returns the status.

    Every method gets the same number of trials on the first seed, judged by the lowest validation
    loss; the best setting is run with all seeds; the adapters of the rounds with the lowest
    validation loss are tested once, at the end.

    Raises:
        FedLLMError: names what cannot work, before anything is trained.
        RunInterrupted: by the user; the same command goes on.
    """
    for key, value in (("--seeds", options.seeds), ("--trials", options.trials)):
        if value < 1:
            raise ConfigError(f"{key} must be > 0, got {value}.")
    protocol = read_protocol(name)
    given = dict(text.partition("=")[::2] for text in options.overrides)
    experiment = given.get("experiment", protocol.experiment)
    root = Path(given.get("output_dir", f"outputs/reproduce-{name}")).expanduser()
    rest = [t for t in options.overrides if t.partition("=")[0] not in ("experiment", "output_dir")]
    overrides = [f"experiment={experiment}", *rest]
    methods, tasks = chosen_methods(options.methods), _tasks(protocol, options)
    study = _Study(protocol, options, root, methods, tasks, overrides)
    study.run_options.check()
    if options.plan:
        print(plan_text(study))
        return 0
    _claim(study)
    study = _kept_apart(study)
    if protocol.start is not None:
        study = _started(study)
    try:
        return _carry_out(study)
    except KeyboardInterrupt as interrupt:
        raise RunInterrupted("interrupted; the same command goes on.") from interrupt


def _tasks(protocol: Protocol, options: ReproduceOptions) -> list[SuiteTask]:
    """The test's tasks, without those of the experiment whose local files are missing.

    Raises:
        ConfigError: none is left.
    """
    tasks, root = chosen_tasks(options.tasks or protocol.tasks), options.data_root
    if root is None or options.tasks:
        return tasks
    found = [task for task in tasks if not missing_files(task, root)]
    if tasks and not found:
        raise ConfigError(
            f"--data-root {root}: holds the files of none of {', '.join(t.name for t in tasks)}; "
            "fedllm evaluate --list names them."
        )
    return found


def _claim(study: _Study) -> None:
    """Write the experiment, its test and overrides into the directory, which may hold the same.

    Raises:
        ConfigError: it holds others, or other files.
    """
    file = study.root / SAVED
    tasks = [task.name for task in study.tasks]  # training keeps apart from their records
    wanted = {"experiment": study.protocol.name, "tasks": tasks, "overrides": study.overrides}
    if file.is_file():
        saved = json.loads(file.read_text("utf-8"))
        if saved != wanted:
            was = shlex.join([saved["experiment"], *saved["overrides"], *saved["tasks"]])
            raise ConfigError(
                f"output_dir={study.root} holds another reproduction, of {was}; give another one."
            )
        return
    refuse_other_files(study.root, f"output_dir={study.root}")
    write_atomically(file, json.dumps(wanted, indent=2).encode())


def _kept_apart(study: _Study) -> _Study:
    """The study with overrides that keep training and validation records apart from the test."""
    if not study.tasks:
        if not any(text.startswith("data.test_path=") for text in study.overrides):
            raise ConfigError("data.test_path=<records to test on> is needed here.")
        return replace(study, overrides=[*study.overrides, "data.near_duplicates=drop"])
    path = study.root / _TEXTS
    if not path.is_file():
        harness, lines = HarnessTasks(), []
        whole = replace(study.run_options, subset=None)
        for task in study.tasks:
            if task.runner == "harness":
                lines += harness.questions(task, whole)
            elif task.runner == "code":
                problems = code_suite.read_problems(task, whole)[0]
                lines += [f"{one.asked[-1]['content']} {one.target}" for one in problems]
        texts = "".join(f"{json.dumps({'text': text})}\n" for text in dict.fromkeys(lines))
        write_atomically(path, texts.encode())
    apart = ["data.near_duplicates=drop", f"data.test_path={path.resolve()}"]
    return replace(study, overrides=[*study.overrides, *apart])


def _started(study: _Study) -> _Study:
    """The study with the adapter that its runs start from; trains it if it is not there yet.

    Raises:
        FedLLMError: its run fails.
    """
    rest = [text for text in study.overrides if not text.startswith(("experiment=", "dpo."))]
    path = study.root / "runs" / "start"
    config = compose([f"experiment={study.protocol.start}", *rest], study.options.config_dir)
    engine = changed(config, federation={"engine": "inprocess"})
    run = PlannedRun(config=replace(engine, output_dir=str(path)))
    if not run.done:
        print(f"start: {study.protocol.start}", flush=True)
        if (error := carry_out_one(run)) is not None:
            raise FedLLMError(f"{path}: {error}")
    adapter = run.directory.adapter_best
    both = [f"init_adapter={adapter}", f"dpo.reference_adapter={adapter}"]
    return replace(study, overrides=[*study.overrides, *both])


def _carry_out(study: _Study) -> int:
    trials = [
        study.run(method, trial)
        for trial in range(study.options.trials)
        for method in study.methods
    ]
    data = trials[0].config.data
    if not data.validation_fraction and not has_eval_source(data):
        raise ConfigError(
            "data.validation_fraction=0 leaves no records to choose settings and rounds by; set it "
            "above 0."
        )
    if study.tasks:
        check_evaluation_fit(trials[0].config, "trained", None)
        code_suite.check(study.run_options)
    first_refusal([run.config for run in trials if not run.done])
    print(
        f"{study.protocol.name}: {len(study.methods)} methods, {study.options.trials} trials each, "
        f"then {study.options.seeds} seeds   output  {study.root}",
        flush=True,
    )
    failed = _train(trials, study.options.jobs)
    chosen: dict[str, MethodRun] = {}
    for method in study.methods:
        own = [run for run in trials if run.method == method.name and _has_scores(run)]
        if own:
            chosen[method.name] = min(own, key=lambda run: _validation(run)["loss"])
    runs = [
        study.run(method, chosen[method.name].trial, chosen[method.name].seed + number)
        for number in range(study.options.seeds)
        for method in study.methods
        if method.name in chosen
    ]
    _write_untested(study, _document(study, trials, []))
    failed += _train(runs, study.options.jobs)
    document = _document(study, trials, runs)
    _write_untested(study, document)
    document["test"] = _tested(study, [run for run in runs if _has_scores(run)])
    for line in _write(study, document):
        print(line)
    return 1 if failed else 0


def _train(runs: Sequence[MethodRun], jobs: int) -> int:
    """Carry out the runs that are not done, with a line for each; returns how many failed."""
    missing = [run for run in runs if not run.done]
    ended = failed = 0

    def report(run: MethodRun, error: str | None) -> None:
        nonlocal ended, failed
        ended += 1
        failed += error is not None
        said = "failed" if error else f"validation loss {_validation(run)['loss']:.4f}"
        setting = "  ".join(f"{key.rpartition('.')[2]}={v:g}" for key, v in run.setting.items())
        print(f"  [{ended}/{len(missing)}] {run.method:<18} seed {run.seed}  {setting:<36} {said}")
        sys.stdout.flush()
        if error is not None:
            print_error(f"{run.directory.path.name}: {error}")

    if jobs > 1:
        carry_out(missing, jobs, report)
    else:
        for run in missing:
            report(run, carry_out_one(run))
    return failed


def _validation(run: MethodRun) -> dict[str, Any]:
    """Scores of the best round on the validation records; an infinite loss without any."""
    best = best_record(read_metrics(run.directory.metrics))
    return {"loss": math.inf} if best is None else {"round": best["round"], **best["eval"]}


def _has_scores(run: MethodRun) -> bool:
    """Whether a run has finished with a finite validation loss."""
    return run.done and math.isfinite(_validation(run)["loss"])


def _document(
    study: _Study, trials: Sequence[MethodRun], runs: Sequence[MethodRun]
) -> dict[str, Any]:
    """All numbers so far, as plain data; the source of every table and figure."""
    first = trials[0].config
    return {
        "experiment": study.protocol.name,
        "command": shlex.join(["fedllm", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "model": first.model.name,
        "device": describe_device(resolve_device(first.training.device)),
        "versions": {name: version(name) for name in ("fedllm-flwr", "torch", "transformers")},
        "setting": {
            "clients": first.federation.num_clients,
            "sampled": first.federation.sample_clients,
            "rounds": first.federation.num_rounds,
            "steps": first.training.max_steps,
            "batch": first.training.batch_size,
            "rank": first.lora.r,
            "partition": f"{first.partition.name} {first.partition.column or ''}".strip(),
            "subset": study.options.subset,
        },
        "trials": [_about(run) for run in trials if _has_scores(run)],
        "runs": [_about(run) for run in runs if _has_scores(run)],
        "test": [],
        "published": list(study.protocol.published),
    }


def _about(run: MethodRun) -> dict[str, Any]:
    """Setting, validation scores and cost of a finished run."""
    records = read_metrics(run.directory.metrics)
    clients = [client for record in records for client in record.get("clients", {}).values()]
    errors = [e for record in records if (e := record.get("aggregation_error")) is not None]
    return {
        "method": run.method,
        "trial": run.trial,
        "seed": run.seed,
        "setting": run.setting,
        "validation": _validation(run),
        "steps": sum(client["steps"] for client in clients),
        "seconds": round(sum(record.get("seconds", 0.0) for record in records), 1),
        "megabytes": sum(r.get("bytes_up", 0) + r.get("bytes_down", 0) for r in records) / 1e6,
        "aggregation_error": sum(errors) / len(errors) if errors else None,
        "curve": [(r["round"], round(r["eval"]["loss"], 5)) for r in records if r.get("eval")],
    }


def _tested(study: _Study, runs: Sequence[MethodRun]) -> list[dict[str, Any]]:
    """Scores of the base model and of every run's best adapters on the test, by row and metric."""
    if not runs:
        return []
    candidates = [
        Candidate(run.method, run.config, kept, run.seed, kept.client)
        for run in runs
        for kept in _best_adapters(run)
    ]
    candidates = [Candidate(BASE, runs[0].config), *candidates]
    if not study.tasks:
        from fedllm_flwr.commands.reproduce.record_scores import scored_on_records

        return scored_on_records(candidates, study.options.subset)
    cache = SamplesCache(default_cache())
    work = study.root / "work"
    scored = Scorer(study.run_options, "trained", cache, work).score(candidates, study.tasks)
    suites = [all_suites()[name] for name in dict.fromkeys(task.suite for task in study.tasks)]
    table = compare_scores(candidates, scored, study.tasks, suites)
    names, owner = [], ""
    for row in table.rows:
        owner = owner if row.name.startswith(" ") else row.name
        names.append(row.name if owner == row.name else f"{owner}, {row.name.strip()}")
    seen = [
        (name, {seed_name(seed): found.value for seed, found in row.by_seed[column].items()})
        for column in table.columns
        for name, row in zip(names, table.rows, strict=True)
        if column in row.scores
    ]
    records = as_records(table)
    return [
        {**one, "model": name, "by_seed": by_seed}
        for one, (name, by_seed) in zip(records, seen, strict=True)
    ]


def _best_adapters(run: MethodRun) -> list[KeptAdapter]:
    """The adapters of the round with the lowest validation loss; of clients the last, if none."""
    try:
        return find_adapters(f"{run.directory.path}@best")
    except ConfigError:  # clients that only lose by training have no best adapters
        return find_adapters(str(run.directory.path))


def _write_untested(study: _Study, document: dict[str, Any]) -> None:
    """Write a document without test, unless an earlier command left a tested one."""
    try:
        tested = json.loads((study.root / RESULTS).read_text("utf-8"))["test"]
    except (OSError, ValueError, KeyError):
        tested = []
    if not tested:
        _write(study, document)


def _write(study: _Study, document: dict[str, Any]) -> list[str]:
    """Write the document, its tables and figures; returns lines for the terminal."""
    text = json.dumps(document, indent=1, allow_nan=False)
    write_atomically(study.root / RESULTS, text.encode())
    return write_document(document, study.root)


def plan_text(study: _Study) -> str:
    """Every run with its setting and its optimizer steps, searches first."""
    table = [["run", "setting", "steps"]]
    known = 0

    def add(name: str, setting: str, runs: Iterable[MethodRun]) -> None:
        nonlocal known
        steps = [run.steps for run in runs]
        known += sum(step or 0 for step in steps)
        each = "by data" if None in steps else f"{steps[0]:,}"
        table.append([name, setting, each if len(steps) == 1 else f"{len(steps)} x {each}"])

    for method in study.methods:
        for trial in range(study.options.trials):
            run = study.run(method, trial)
            shown = "  ".join(f"{key}={value:g}" for key, value in run.setting.items())
            add(f"{method.name}, trial {trial + 1}", shown, [run])
    for method in study.methods:
        more = [study.run(method, 0)] * (study.options.seeds - 1)
        if more:
            name = f"{method.name}, {len(more)} further seeds"
            add(name, "the trial of least validation loss", more)
    tasks = ", ".join(task.name for task in study.tasks) or "the records of data.test_path"
    return (
        f"{text_table(table)}\n\n{known:,} optimizer steps of all clients together, in "
        f"{len(study.methods) * (study.options.trials + study.options.seeds - 1)} runs\n"
        f"test, once, of each method's adapters of all seeds: {tasks}"
    )


def table_again(path: Path) -> int:
    """Write the tables and figures of a document anew, beside it.

    Raises:
        ConfigError: it is no document of this command.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        document = json.loads(file.read_text("utf-8"))
        lines = write_document(document, file.parent)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--table {path}: no {RESULTS} of fedllm reproduce ({type(error).__name__}: {error})."
        ) from error
    for line in lines:
        print(line)
    return 0


def reproduce_arguments(arguments: argparse.Namespace) -> int:
    """Carry out the command; returns its exit status."""
    if arguments.table is not None:
        return table_again(arguments.table)
    if arguments.experiment is None:
        raise ConfigError("reproduce: name an experiment, or give --table RESULTS.")
    names = set(ReproduceOptions.__dataclass_fields__)
    return reproduce(
        arguments.experiment, ReproduceOptions(**{name: getattr(arguments, name) for name in names})
    )
