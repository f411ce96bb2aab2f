"""Sweeps: one run after the other for every combination of values."""

import csv
import io
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import compose, expand_sweep
from fedllm_flwr.errors import ConfigError, FedLLMError, RunInterrupted
from fedllm_flwr.federation.state import newest_round
from fedllm_flwr.files import write_atomically
from fedllm_flwr.reporting.console import Console, print_error
from fedllm_flwr.reporting.metrics import read_metrics, summarise
from fedllm_flwr.runs.directory import PlannedRun
from fedllm_flwr.runs.fit import first_refusal
from fedllm_flwr.server.opening import with_absolute_paths
from fedllm_flwr.server.run import run_simulation

SWEEP = "sweep.json"  # in the directory of all runs: what was asked for, and the runs' names
_TABLE = "results.csv"
_SCORES = ("loss", "accuracy", "macro_f1", "margin", "answer_tokens")


@dataclass(frozen=True)
class _Run(PlannedRun):
    """One combination: its name, its swept values by key, and its configuration."""

    name: str
    values: dict[str, str]


def multirun(overrides: Sequence[str], config_dir: str | None, quiet: bool = False) -> int:
    """Carry out every combination of a sweep and write a table of their results.

    Each run writes a directory of its own below ``output_dir``, which holds the table, too; it is
    written anew after each run. All configurations are checked before the first run starts. A run
    that fails is reported and the others go on; the status is then 1. ``resume=<directory>`` goes
    on with a sweep that stopped: what is done stays, what was begun is continued.

    Raises:
        ConfigError: no sweep, a combination that cannot work, or a directory that is taken.
        RunInterrupted: by the user; says how to go on.
    """
    resumed = [text.partition("=")[2] for text in overrides if text.startswith("resume=")]
    if resumed:
        root = Path(resumed[-1]).expanduser()
        overrides, config_dir = _saved(root, overrides)
    combinations = expand_sweep(overrides, config_dir)
    if len(combinations) < 2:
        raise ConfigError("--multirun needs a key with several values, such as seed=1,2,3.")
    configs = [compose(combination, config_dir) for combination in combinations]
    first_refusal([with_absolute_paths(config) for config in configs])
    if not resumed:
        root = _root(configs)
    runs = []
    for number, (combination, config) in enumerate(zip(combinations, configs, strict=True)):
        swept = [text for text in combination if text not in overrides]
        path = str(root / f"{number}-{','.join(swept)}".replace("/", "_"))
        values = dict(text.split("=", 1) for text in swept)
        runs.append(_Run(",".join(swept), values, config=replace(config, output_dir=path)))
    names = [run.directory.path.name for run in runs]
    saved = {"overrides": [*overrides], "config_dir": config_dir, "runs": names}
    write_atomically(root / SWEEP, json.dumps(saved, indent=2).encode())
    errors = _carry_out(root, runs, quiet)
    print(f"\n{_as_text(_rows(runs, errors))}\ntable  {root / _TABLE}")
    return 1 if errors else 0


def _carry_out(root: Path, runs: Sequence[_Run], quiet: bool) -> dict[str, str]:
    """Do what is not done yet; returns errors by name."""
    errors: dict[str, str] = {}
    for number, run in enumerate(runs, start=1):
        done = ", done before" if run.done else ""
        print(f"[{number}/{len(runs)}] {run.name}{done}", flush=True)
        if done:
            continue
        try:
            with Console(quiet=quiet) as console:
                run_simulation(_begun(run), console, time.monotonic())
        except FedLLMError as error:
            print_error(str(error))
            errors[run.name] = str(error)
        except KeyboardInterrupt as interrupt:
            finished = sum(item.done for item in runs)
            command = shlex.quote(f"resume={root}")
            raise RunInterrupted(
                f"interrupted; {finished} of {len(runs)} runs are done, go on with: "
                f"fedllm run --multirun {command}"
            ) from interrupt
        finally:
            write_atomically(root / _TABLE, _as_csv(_rows(runs, errors)).encode())
    return errors


def _begun(run: _Run) -> Config:
    """The configuration that goes on with a run that has saved a round, else begins it."""
    if newest_round(run.directory.checkpoints) is not None:
        return replace(run.config, resume=str(run.directory.path))
    run.directory.config.unlink(missing_ok=True)  # of a process that was killed before that
    return run.config


def _saved(root: Path, typed: Sequence[str]) -> tuple[list[str], str | None]:
    """The overrides of a sweep that stopped, and its directory of further choices."""
    file = root / SWEEP
    if not file.is_file():
        raise ConfigError(f"resume={root}: no {SWEEP} there; give the directory of a sweep.")
    if other := [text for text in typed if not text.startswith("resume=")]:
        raise ConfigError(f"{other[0]}: a sweep goes on with its own overrides; drop it.")
    saved = json.loads(file.read_text(encoding="utf-8"))
    return saved["overrides"], saved["config_dir"]


def _root(configs: Sequence[Config]) -> Path:
    """The directory of all runs: ``output_dir``, else multirun/<month day-time>."""
    asked = {config.output_dir for config in configs}
    if len(asked) > 1:
        raise ConfigError(
            "output_dir has several values: --multirun makes a directory for each run below one; "
            "give that one."
        )
    (given,) = asked
    if given is None:
        return Path("multirun") / datetime.now().strftime("%m%d-%H%M%S")
    root = Path(given).expanduser()
    if (root / SWEEP).is_file():
        raise ConfigError(
            f"output_dir={given} holds a sweep already; give another directory, or go on with it: "
            f"fedllm run --multirun {shlex.quote(f'resume={root}')}"
        )
    if root.is_dir() and any(root.iterdir()):
        raise ConfigError(f"output_dir={given} is not empty; give another directory.")
    return root


def _rows(runs: Sequence[_Run], errors: Mapping[str, str]) -> list[dict[str, str]]:
    """A row for each run that is done or has failed: its swept values, then its final scores."""
    rows = []
    for run in runs:
        row = {"run": run.name, **run.values}
        if run.done:
            final = summarise(read_metrics(run.directory.metrics), {})["final"] or {}
            row |= {name: f"{final[name]:.4f}" for name in _SCORES if name in final}
        elif run.name in errors:
            row["error"] = errors[run.name]
        else:
            continue
        rows.append(row)
    return rows


def _columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """``run``, the swept keys, the scores that any run has, and ``error`` if one failed."""
    found = list(dict.fromkeys(name for row in rows for name in row))
    last = [name for name in (*_SCORES, "error") if name in found]
    return ["run", *(name for name in found if name not in ("run", *last)), *last]


def _as_csv(rows: Sequence[Mapping[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _as_text(rows: Sequence[Mapping[str, str]]) -> str:
    """Aligned columns for a terminal: swept keys and scores; an error in the place of scores."""
    names = [name for name in _columns(rows) if name not in ("run", "error")]
    table = [names, *([row.get(name, "") for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    lines = ["   ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) for line in table]
    failed = ["", *(row.get("error", "") for row in rows)]
    return "\n".join(
        f"{line.rstrip()}   failed: {error}" if error else line.rstrip()
        for line, error in zip(lines, failed, strict=True)
    )
