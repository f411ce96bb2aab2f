"""``fedllm run --multirun``: one run per combination of values."""

import csv
import io
import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from fedllm_flwr.commands.compare.jobs import carry_out
from fedllm_flwr.commands.launched import check_launcher, launch
from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.compose import compose, expand_sweep
from fedllm_flwr.errors import ConfigError, FedLLMError, RunInterrupted
from fedllm_flwr.files import write_atomically
from fedllm_flwr.reporting.console import Console, print_error
from fedllm_flwr.reporting.metrics import read_metrics, summarise, validation_losses
from fedllm_flwr.runs.directory import PlannedRun
from fedllm_flwr.runs.fit import first_refusal
from fedllm_flwr.server.opening import with_absolute_paths
from fedllm_flwr.server.run import run_simulation
from fedllm_flwr.tasks import table_metrics

SWEEP = "sweep.json"  # overrides and names of the runs, in the sweep's directory
_TABLE, _FIGURE = "results.csv", "results.png"
_MOST_LINES = 12


@dataclass(frozen=True)
class SweptRun(PlannedRun):
    """The run of one combination of values."""

    name: str
    values: dict[str, str]


def multirun(
    overrides: Sequence[str], config_dir: str | None, quiet: bool = False, workers: int = 1
) -> int:
    """Run every combination of a sweep, with one table and one figure; return the exit status.

    Each run writes to its own directory in ``output_dir``, and the table is updated after each run.
    All configurations are checked before the first run starts. After a failed run, the sweep
    continues and its exit status is 1. ``resume=<directory>`` resumes a stopped sweep.

    Args:
        overrides: includes those of Hydra's launcher, such as ``hydra/launcher=joblib``.
        workers: number of runs in parallel, one process each.

    Raises:
        ConfigError: no key has several values, a combination is invalid, or the directory exists.
        RunInterrupted: the user stopped the sweep; names the command that resumes it.
    """
    launcher = [text for text in overrides if text.startswith(("hydra/", "hydra."))]
    check_launcher(launcher)
    overrides = [text for text in overrides if text not in launcher]
    resumed = [text.partition("=")[2] for text in overrides if text.startswith("resume=")]
    if resumed:
        root = Path(resumed[-1]).expanduser()
        if not (root / SWEEP).is_file():
            raise ConfigError(f"resume={root}: no {SWEEP} there; give a sweep's directory.")
        if other := [text for text in overrides if not text.startswith("resume=")]:
            raise ConfigError(f"{other[0]}: a sweep is resumed with its own overrides; remove it.")
        saved = json.loads((root / SWEEP).read_text(encoding="utf-8"))
        overrides, config_dir = saved["overrides"], saved["config_dir"]
    combinations = expand_sweep(overrides, config_dir)
    if len(combinations) < 2:
        raise ConfigError("--multirun needs a key with several values, such as seed=1,2,3.")
    configs = [compose(combination, config_dir) for combination in combinations]
    if workers > 1 or launcher:  # in-process runs are bit-identical to runs on Ray
        configs = [
            changed(config, federation={"engine": "inprocess"})
            if config.federation.engine == "ray"
            else config
            for config in configs
        ]
    first_refusal([with_absolute_paths(config) for config in configs])
    if not resumed:
        root = _new_directory(configs)
    runs = []
    for number, (combination, config) in enumerate(zip(combinations, configs, strict=True)):
        swept = [text for text in combination if text not in overrides]
        path = str(root / f"{number}-{','.join(swept)}".replace("/", "_"))
        values = dict(text.split("=", 1) for text in swept)
        config = changed(config, tracking={"group": config.tracking.group or root.name})
        runs.append(SweptRun(",".join(swept), values, config=replace(config, output_dir=path)))
    names = [run.directory.path.name for run in runs]
    saved = {"overrides": [*overrides], "config_dir": config_dir, "runs": names}
    write_atomically(root / SWEEP, json.dumps(saved, indent=2).encode())
    errors = _carry_out(root, runs, quiet, workers, launcher)
    print(f"\n{_as_text(_rows(runs, errors))}")
    if (line := _best(runs)) is not None:
        print(line)
    figure = f"   figure  {root / _FIGURE}" if _draw(root, runs) else ""
    print(f"table  {root / _TABLE}{figure}")
    return 1 if errors else 0


def _carry_out(
    root: Path, runs: Sequence[SweptRun], quiet: bool, workers: int, launcher: Sequence[str]
) -> dict[str, str]:
    """Execute unfinished runs; return errors by run name."""
    errors: dict[str, str] = {}
    try:
        if launcher:
            failed = launch(root, runs, launcher)
            errors |= {runs[number].name: error for number, error in failed.items()}
        elif workers > 1:
            _side_by_side(runs, workers, errors)
        else:
            _one_by_one(root, runs, quiet, errors)
    except KeyboardInterrupt as interrupt:
        finished = sum(item.done for item in runs)
        command = shlex.quote(f"resume={root}")
        raise RunInterrupted(
            f"interrupted; {finished} of {len(runs)} runs are done, resume with: "
            f"fedllm run --multirun {command}"
        ) from interrupt
    finally:
        _write_table(root, runs, errors)
    for error in errors.values() if launcher else ():
        print_error(error)
    return errors


def _one_by_one(root: Path, runs: Sequence[SweptRun], quiet: bool, errors: dict[str, str]) -> None:
    for number, run in enumerate(runs, start=1):
        done = ", already finished" if run.done else ""
        print(f"[{number}/{len(runs)}] {run.name}{done}", flush=True)
        if done:
            continue
        try:
            with Console(quiet=quiet) as console:
                run_simulation(run.begin(), console, time.monotonic())
        except FedLLMError as error:
            print_error(str(error))
            errors[run.name] = str(error)
        finally:
            _write_table(root, runs, errors)


def _side_by_side(runs: Sequence[SweptRun], workers: int, errors: dict[str, str]) -> None:
    ended = sum(run.done for run in runs)
    print(f"{len(runs)} runs, {ended} done, {workers} at a time", flush=True)

    def report(run: SweptRun, error: str | None) -> None:
        nonlocal ended
        ended += 1
        print(f"[{ended}/{len(runs)}] {run.name}", flush=True)
        if error is not None:
            print_error(error)
            errors[run.name] = error

    carry_out(runs, workers, report)


def _write_table(root: Path, runs: Sequence[SweptRun], errors: Mapping[str, str]) -> None:
    rows, text = _rows(runs, errors), io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(root / _TABLE, text.getvalue().encode())


def _lowest(run: SweptRun) -> float:
    """The lowest validation loss of a run; infinite without one."""
    losses = validation_losses(read_metrics(run.directory.metrics)) if run.done else []
    return min((loss for _, loss in losses), default=math.inf)


def _best(runs: Sequence[SweptRun]) -> str | None:
    """A line about the run with the lowest validation loss; None without any."""
    best = min(runs, key=_lowest)
    loss = _lowest(best)
    if not math.isfinite(loss):
        return None
    return f"best by validation loss: {best.name} ({loss:.4f}), {best.directory.path}@best"


def _draw(root: Path, runs: Sequence[SweptRun]) -> bool:
    """Plot the runs' validation losses, only the best of many; return False if there are none."""
    from fedllm_flwr.reporting.plots import plot_comparison

    shown = [run for run in sorted(runs, key=_lowest)[:_MOST_LINES] if _lowest(run) < math.inf]
    if not shown or not shown[0].config.tracking.figures:
        return False
    curves = {}
    for run in sorted(shown, key=runs.index):
        losses = validation_losses(read_metrics(run.directory.metrics))
        finite = [(number, loss) for number, loss in losses if math.isfinite(loss)]
        curves[run.name] = [(number, loss, loss, loss) for number, loss in finite]
    caption = "" if len(shown) == len(runs) else f"The best {len(shown)} of {len(runs)} runs."
    plot_comparison(curves, root / _FIGURE, "validation loss", caption)
    return True


def _new_directory(configs: Sequence[Config]) -> Path:
    """Directory of a new sweep: ``output_dir``, or multirun/<month day-time>."""
    asked = {config.output_dir for config in configs}
    if len(asked) > 1:
        raise ConfigError(
            "output_dir has several values, but --multirun creates a directory per run in one "
            "directory; give one value."
        )
    (given,) = asked
    if given is None:
        return Path("multirun") / datetime.now().strftime("%m%d-%H%M%S")
    root = Path(given).expanduser()
    if (root / SWEEP).is_file():
        raise ConfigError(
            f"output_dir={given} holds a sweep already; give another directory, or resume it: "
            f"fedllm run --multirun {shlex.quote(f'resume={root}')}"
        )
    if root.is_dir() and any(root.iterdir()):
        raise ConfigError(f"output_dir={given} is not empty; give another directory.")
    return root


def _rows(runs: Sequence[SweptRun], errors: Mapping[str, str]) -> list[dict[str, str]]:
    """A row per finished or failed run: swept values, then final scores."""
    rows = []
    for run in runs:
        row = {"run": run.name, **run.values}
        if run.done:
            final = summarise(read_metrics(run.directory.metrics), {})["final"] or {}
            row |= {name: f"{final[name]:.4f}" for name in table_metrics() if name in final}
        elif run.name in errors:
            row["error"] = errors[run.name]
        else:
            continue
        rows.append(row)
    return rows


def _columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """``run``, the swept keys, the scores of any run, and ``error`` if a run failed."""
    found = list(dict.fromkeys(name for row in rows for name in row))
    last = [name for name in (*table_metrics(), "error") if name in found]
    return ["run", *(name for name in found if name not in ("run", *last)), *last]


def _as_text(rows: Sequence[Mapping[str, str]]) -> str:
    """Aligned columns for a terminal: swept keys, then scores or an error."""
    names = [name for name in _columns(rows) if name not in ("run", "error")]
    table = [names, *([row.get(name, "") for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    lines = ["   ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) for line in table]
    failed = ["", *(row.get("error", "") for row in rows)]
    return "\n".join(
        f"{line.rstrip()}   failed: {error}" if error else line.rstrip()
        for line, error in zip(lines, failed, strict=True)
    )
