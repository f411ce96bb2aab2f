"""``fedllm tune``: search each algorithm's learning rate by the clients' validation loss."""

import csv
import importlib.util
import io
import json
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from fedllm_flwr.commands.compare.command import BASELINES, COMPARED
from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.compose import compose
from fedllm_flwr.errors import ConfigError, DivergedError, RunInterrupted
from fedllm_flwr.files import write_atomically
from fedllm_flwr.plugins import ALGORITHMS
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.reporting.metrics import read_metrics, validation_losses
from fedllm_flwr.reporting.text import markdown_table
from fedllm_flwr.runs.directory import PlannedRun, refuse_other_files
from fedllm_flwr.runs.fit import first_refusal
from fedllm_flwr.server.opening import with_absolute_paths
from fedllm_flwr.server.run import run_simulation

SAVED = "tune.json"  # the options, in the search's directory
_KEY = "training.learning_rate"


@dataclass(frozen=True)
class Search:
    """The options of a search, the same for every algorithm.

    Args:
        lowest, highest: range of learning rates, searched on a logarithmic scale.
    """

    trials: int
    lowest: float
    highest: float

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"--trials must be > 0, got {self.trials}.")
        if not 0 < self.lowest < self.highest:
            raise ConfigError(f"--range {self.lowest:g} {self.highest:g}: give 0 < LOW < HIGH.")


@dataclass(frozen=True)
class Trial:
    """A learning rate, and the lowest validation loss of its run; infinite if it diverged."""

    algorithm: str
    rate: float
    loss: float
    path: Path


def tune(arguments: Sequence[str], config_dir: str | None, search: Search) -> int:
    """Search learning rates and write the results; ``resume=<directory>`` resumes a search.

    Every algorithm has the same number of trials, range, seed and validation records, which are
    held out by its clients (``data.validation_fraction``). The central held-out records, on which
    results are reported, are not used. A rate's score is the lowest validation loss of its run.

    Raises:
        ConfigError: Optuna is missing, or an argument is invalid.
        RunInterrupted: the user stopped the search; names the command that resumes it.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("fedllm tune needs Optuna: pip install 'fedllm-flwr[tune]'.")
    options = {"algorithm": "all", "output_dir": "", "resume": ""}
    options |= dict(text.split("=", 1) for text in arguments if text.split("=")[0] in options)
    own = [text for text in arguments if text.split("=")[0] not in options]
    if options["resume"]:
        root = Path(options["resume"]).expanduser()
        if not (root / SAVED).is_file():
            raise ConfigError(f"resume={root}: no {SAVED} there; give a search's directory.")
        saved = json.loads((root / SAVED).read_text("utf-8"))
        own, config_dir, names = saved["overrides"], saved["config_dir"], saved["algorithms"]
        search = Search(**saved["search"])
    else:
        names = _algorithms(options["algorithm"])
        root = _new_directory(options["output_dir"])
    configs = {name: _config([*own, f"algorithm={name}"], config_dir) for name in names}
    first_refusal([with_absolute_paths(config) for config in configs.values()])
    saved = {"overrides": own, "config_dir": config_dir, "algorithms": names}
    saved |= {"search": vars(search)}
    write_atomically(root / SAVED, json.dumps(saved, indent=2).encode())
    print(
        f"tuning {', '.join(names)}\n  {search.trials} learning rates each, {search.lowest:g} to "
        f"{search.highest:g}   output  {root}",
        flush=True,
    )
    trials: list[Trial] = []
    try:
        for name, config in configs.items():
            _search(config, name, search, root, trials)
    except KeyboardInterrupt as interrupt:
        command = f"fedllm tune {shlex.quote(f'resume={root}')}"
        raise RunInterrupted(f"interrupted; resume with: {command}") from interrupt
    _write(root, trials, names)
    return 0


def _search(config: Config, name: str, search: Search, root: Path, trials: list[Trial]) -> None:
    """Run the trials of one algorithm; finished runs are not repeated.

    Optuna's sampler proposes the same rates for the same results, so a resumed search finds its
    previous runs.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=config.seed)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    ends = optuna.distributions.FloatDistribution(search.lowest, search.highest, log=True)
    for number in range(search.trials):
        asked = study.ask({_KEY: ends})
        rate = float(f"{asked.params[_KEY]:.4g}")
        low = config.training.min_learning_rate * rate / config.training.learning_rate
        planned = PlannedRun(
            config=replace(
                changed(config, training={"learning_rate": rate, "min_learning_rate": low}),
                output_dir=str(root / "runs" / f"{name}-{number}"),
            )
        )
        loss = _loss(planned)
        if math.isfinite(loss):
            study.tell(asked, loss)
        else:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        trials.append(Trial(name, rate, loss, planned.directory.path))
        said = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
        print(
            f"  {name:<12} {number + 1:>3}/{search.trials}   {_KEY}={rate:<9g} {said}", flush=True
        )


def _loss(run: PlannedRun) -> float:
    """The lowest validation loss of a run, which is executed unless it has finished."""
    failed = run.directory.path.with_suffix(".diverged")
    if failed.is_file():
        return math.inf
    if not run.done:
        try:
            run_simulation(run.begin(), Console(quiet=True), time.monotonic())
        except DivergedError as error:
            write_atomically(failed, str(error).encode())
            return math.inf
    losses = validation_losses(read_metrics(run.directory.metrics))
    return min((loss for _, loss in losses), default=math.inf)


def _config(overrides: Sequence[str], config_dir: str | None) -> Config:
    """The configuration of an algorithm's trials, except for the learning rate."""
    asked = ["evaluation.clients=true", "evaluation.central=false"]
    config = compose([*overrides, *asked], config_dir)
    if not config.data.validation_fraction:
        raise ConfigError(
            "data.validation_fraction=0 leaves no validation records; set it above 0."
        )
    every = config.evaluation.every or config.federation.num_rounds
    return changed(
        config,
        federation={"engine": "inprocess"},
        evaluation={"every": every},
        tracking={"figures": False, "report": False},
    )


def _algorithms(text: str) -> list[str]:
    if text == "all":
        return [name for name in COMPARED if name not in BASELINES]
    names = [name.strip("[] ") for name in text.split(",")]
    choices = [name for name in ALGORITHMS.names() if name != "local"]
    for name in names:
        if name not in choices:
            raise ConfigError(f"algorithm={name}: choose all, or a list from {', '.join(choices)}.")
    return list(dict.fromkeys(names))


def _new_directory(given: str) -> Path:
    root = Path(given or f"outputs/{datetime.now():%m%d-%H%M}-tune").expanduser()
    if (root / SAVED).exists():
        raise ConfigError(f"output_dir={root} holds a search already; resume it: resume={root}.")
    refuse_other_files(root, f"output_dir={root}")
    return root


def _write(root: Path, trials: Sequence[Trial], names: Sequence[str]) -> None:
    """Write all trials as CSV, their figure, and a table with the best of each algorithm."""
    from fedllm_flwr.reporting.plots import plot_comparison

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["algorithm", _KEY, "validation_loss", "run"])
    writer.writerows([t.algorithm, f"{t.rate:g}", t.loss, t.path.name] for t in trials)
    write_atomically(root / "tune.csv", text.getvalue().encode())
    curves, rows = {}, [["", _KEY, "validation loss", "trials", "diverged"]]
    for name in names:
        own = [trial for trial in trials if trial.algorithm == name]
        finite = sorted((t for t in own if math.isfinite(t.loss)), key=lambda t: t.rate)
        curves[name] = [(math.log10(t.rate), t.loss, t.loss, t.loss) for t in finite]
        best = min(finite, key=lambda t: t.loss, default=None)
        found = ["-", "-"] if best is None else [f"{best.rate:g}", f"{best.loss:.4f}"]
        rows.append([name, *found, str(len(own)), str(len(own) - len(finite))])
    label, axis = "lowest validation loss", f"log10 of {_KEY}"
    plot_comparison(curves, root / "tune.png", label, "Each point is a run.", axis)
    write_atomically(root / "tune.md", f"{markdown_table(rows)}\n".encode())
    print("\n" + markdown_table(rows))
    print(f"\n  table {root / 'tune.csv'}, {root / 'tune.md'}   figure {root / 'tune.png'}")
