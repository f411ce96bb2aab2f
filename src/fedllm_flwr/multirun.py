"""Sweeps: one run after the other for every combination of values."""

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from fedllm_flwr.checkpoint import write_atomically
from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import compose, expand_sweep
from fedllm_flwr.errors import ConfigError, FedLLMError
from fedllm_flwr.fit import first_refusal
from fedllm_flwr.reporting.console import Console, print_error
from fedllm_flwr.reporting.metrics import read_metrics, summarise
from fedllm_flwr.run import run_simulation, with_absolute_paths

_COLUMNS = ("loss", "accuracy", "macro_f1")


def multirun(overrides: Sequence[str], config_dir: str | None, quiet: bool = False) -> int:
    """Carry out every combination of a sweep and write a table of their results.

    Each run writes a directory of its own below ``output_dir``, which holds the table, too. All
    configurations are checked before the first run starts. A run that fails is reported and the
    others go on; the status is then 1.

    Raises:
        ConfigError: no sweep, a combination that cannot work, or a directory that is taken.
    """
    combinations = expand_sweep(overrides, config_dir)
    if len(combinations) < 2:
        raise ConfigError("--multirun needs a key with several values, such as seed=1,2,3.")
    configs = [compose(combination, config_dir) for combination in combinations]
    first_refusal([with_absolute_paths(config) for config in configs])
    root = _root(configs)
    rows: list[dict[str, object]] = []
    for number, (combination, config) in enumerate(zip(combinations, configs, strict=True)):
        name = _name(combination, overrides)
        print(f"[{number + 1}/{len(configs)}] {name}", flush=True)
        config = replace(config, output_dir=str(root / f"{number}-{name}".replace("/", "_")))
        rows.append({"run": name, **_result(config, quiet)})
    write_atomically(root / "results.csv", _table(rows).encode())
    print(f"\n{_table(rows)}\ntable  {root / 'results.csv'}")
    return 1 if any("error" in row for row in rows) else 0


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
    if root.is_dir() and any(root.iterdir()):
        raise ConfigError(f"output_dir={given} is not empty; give another directory.")
    return root


def _result(config: Config, quiet: bool) -> dict[str, object]:
    """Final scores of one run, or its error."""
    try:
        with Console(quiet=quiet) as console:
            directory = run_simulation(config, console, time.monotonic())
    except FedLLMError as error:
        print_error(str(error))
        return {"error": str(error)}
    summary = summarise(read_metrics(directory.metrics), {})
    final = summary["final"] or {}
    return {name: f"{final[name]:.4f}" for name in _COLUMNS if name in final}


def _name(combination: Sequence[str], overrides: Sequence[str]) -> str:
    """The swept values of a combination: those that are not the same in every run."""
    swept = [text for text in combination if text not in overrides]
    return ",".join(swept)


def _table(rows: Sequence[dict[str, object]]) -> str:
    names = ["run", *(n for n in (*_COLUMNS, "error") if any(n in row for row in rows))]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
