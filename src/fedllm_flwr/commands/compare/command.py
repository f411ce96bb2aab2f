"""The command: from overrides to a table and a figure, resumable."""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from fedllm_flwr import tasks
from fedllm_flwr.commands.compare.jobs import Job, carry_out, make_jobs
from fedllm_flwr.commands.compare.page import comparison_page
from fedllm_flwr.commands.compare.results import Tabulated, cost_curves, curves
from fedllm_flwr.commands.compare.table import (
    as_csv,
    as_markdown,
    as_text,
    own_records_lines,
)
from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import compose, expand_sweep, load_run
from fedllm_flwr.errors import ConfigError, RunInterrupted
from fedllm_flwr.files import write_atomically
from fedllm_flwr.models.device import cpu_count
from fedllm_flwr.plugins import ALGORITHMS
from fedllm_flwr.reporting.console import print_error
from fedllm_flwr.reporting.html.page import Page
from fedllm_flwr.reporting.html.render import render
from fedllm_flwr.reporting.text import format_seconds, markdown_table, text_table
from fedllm_flwr.runs.directory import refuse_other_files
from fedllm_flwr.runs.fit import first_refusal
from fedllm_flwr.runs.report import REPORT, report_or_warning, run_facts
from fedllm_flwr.simulation.resources import check_machine

BASELINES = ("local", "centralized")
# Local training first and centralised training last, so that the table goes from the lower bound
# to the upper bound.
ORDER = ("local", *(name for name in ALGORITHMS.builtin if name not in BASELINES), "centralized")
COMPARED = (
    *("local", "fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam"),
    "centralized",
)
"""The algorithms of ``algorithm=all``, unless ``compare.algorithms`` lists others."""
SAVED = "compare.json"  # the options, in the comparison's directory


def compare(arguments: Sequence[str], config_dir: str | None) -> tuple[Path, int]:
    """Run a comparison and write its results; ``resume=<directory>`` resumes a stopped one.

    Args:
        arguments: overrides, including ``algorithm=all`` or a comma-separated list,
            ``seeds=<count>``, ``output_dir=`` and ``resume=``.

    Returns:
        The comparison's directory, and the number of failed runs.

    Raises:
        ConfigError: an argument is invalid.
    """
    options, own = _split(arguments)
    _refuse_sweeps(options, own)
    if "resume" in options:
        root = Path(options["resume"]).expanduser()
        options, own = _saved(root)
    else:
        root = _new_directory(options, own)
    algorithms = _algorithms(options.get("algorithm", "all"), own)
    seeds = [f"compare.seeds={options['seeds']}"] if "seeds" in options else []
    jobs = make_jobs([*own, *seeds], config_dir, algorithms, root)
    config = jobs[0].config
    check_machine(config)
    first_refusal([job.config for job in jobs if not job.done])
    names = [job.directory.path.name for job in jobs]
    saved = json.dumps({"options": options, "overrides": own, "runs": names}, indent=2)
    write_atomically(root / SAVED, saved.encode())
    workers = config.compare.jobs or max(1, cpu_count() // config.federation.client_cpus)
    done, count = sum(job.done for job in jobs), config.compare.seeds
    repeats = f"{count} seed{'s' * (count != 1)}"
    runs = f"{len(jobs)} runs ({repeats}), {done} done, {workers} at a time"
    print(f"comparing {', '.join(algorithms)}\n  {runs}   output  {root}", flush=True)
    try:
        failed = _carry_out(jobs, workers)
    except KeyboardInterrupt as interrupt:
        finished = sum(job.done for job in jobs)
        raise RunInterrupted(
            f"interrupted; {finished} of {len(jobs)} runs are done, resume with: "
            f"fedllm compare resume={root}"
        ) from interrupt
    _write(root, jobs, algorithms)
    return root, failed


def _refuse_sweeps(options: dict[str, str], overrides: Sequence[str]) -> None:
    """Reject lists of values other than algorithms; `fedllm run -m` is for these.

    Raises:
        ConfigError: names the list, and what to write instead.
    """
    counted = "give their number: seeds=3 with seed=1 runs the seeds 1, 2 and 3."
    if not options.get("seeds", "1").isdecimal():
        raise ConfigError(f"seeds={options['seeds']}: {counted}")
    for text in overrides:
        if len(expand_sweep([text])) > 1:
            key = text.partition("=")[0]
            remedy = counted if key == "seed" else "a comparison takes one value; choose one."
            raise ConfigError(f"{text}: {remedy}")


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The command's own options, and the overrides of all runs."""
    own = ("algorithm", "seeds", "output_dir", "resume")
    options: dict[str, str] = {}
    overrides = []
    for text in arguments:
        key, _, value = text.partition("=")
        if key in own:
            options[key] = value
        else:
            overrides.append(text)
    if not any(text.split("=")[0] in ("experiment", "data", "model") for text in overrides):
        chosen = dict(text.split("=", 1) for text in overrides if text.startswith("task="))
        name = chosen.get("task", Config().task.name)
        if name in tasks.names() and (experiment := tasks.find(name).comparison):
            overrides.append(f"experiment={experiment}")
    return options, overrides


def _saved(root: Path) -> tuple[dict[str, str], list[str]]:
    """The options and overrides of a stopped comparison."""
    file = root / SAVED
    if not file.is_file():
        raise ConfigError(f"resume={root}: no {SAVED} there; give a comparison's directory.")
    saved = json.loads(file.read_text(encoding="utf-8"))
    return saved["options"], saved["overrides"]


def _new_directory(options: dict[str, str], overrides: list[str]) -> Path:
    """Output directory of a new comparison."""
    stamp, data = datetime.now().strftime("%m%d-%H%M"), compose(overrides).data.name
    root = Path(options.get("output_dir", f"outputs/{stamp}-compare-{data}")).expanduser()
    if (root / SAVED).exists():
        raise ConfigError(
            f"output_dir={root} holds a comparison already; resume it: resume={root}."
        )
    refuse_other_files(root, f"output_dir={root}")
    return root


def _algorithms(text: str, overrides: list[str]) -> list[str]:
    names = [name.strip("[] ") for name in text.split(",")]
    if text == "all":
        names = compose(overrides).compare.algorithms or list(COMPARED)
    choices = ALGORITHMS.names()
    for name in names:
        if name not in choices:
            raise ConfigError(f"algorithm={name}: choose all, or a list from {', '.join(choices)}.")
    order = [*ORDER[:-1], *(name for name in choices if name not in ORDER), ORDER[-1]]
    return sorted(set(names), key=order.index)


def _carry_out(jobs: Sequence[Job], workers: int) -> int:
    """Execute the jobs, printing a line as each ends; return the number of failures."""
    total, started = len(jobs), time.monotonic()
    before = sum(job.done for job in jobs)
    ended = failed = 0

    def report(job: Job, error: str | None) -> None:
        nonlocal ended, failed
        ended += 1
        failed += error is not None
        still = total - before - ended
        left = (time.monotonic() - started) / ended * still
        remaining = f"{format_seconds(left)} left" if still else ""
        name = f"[{before + ended:>{len(str(total))}}/{total}] {job.algorithm} seed {job.seed}"
        outcome = "failed"
        if error is None:
            final = json.loads(job.directory.summary.read_text(encoding="utf-8"))["final"] or {}
            outcome = "   ".join(
                f"{key} {final[key]:.3f}"
                for key, metric in tasks.all_metrics().items()
                if metric.round_width and key in final
            )
        print(f"  {name:<32} {outcome:<40} {remaining}".rstrip(), flush=True)
        if error is not None:
            print_error(f"{job.algorithm} seed {job.seed}: {error}")

    carry_out(jobs, workers, report)
    return failed


def _write(root: Path, jobs: Sequence[Job], algorithms: Sequence[str]) -> None:
    """Write tables, figures and the report, and print the table."""
    from fedllm_flwr.reporting.plots import plot_comparison

    found = Tabulated.of(jobs, algorithms)
    if found is None:
        return
    outcomes, rows, metric = found.outcomes, found.rows, found.metric
    seeds = len({outcome.job.seed for outcome in outcomes})
    text, own = as_markdown(rows, metric, found.note), found.on_own_records()
    if own:
        text += f"\n{markdown_table(own_records_lines(own))}\n"
    write_atomically(root / "compare.md", text.encode())
    write_atomically(root / "compare.csv", as_csv(rows).encode())
    caption = "Lines: " + (f"mean over {seeds} seeds" if seeds > 1 else "one seed")
    caption += ", with markers at evaluated rounds."
    caption += " Bands: lowest to highest seed." if seeds > 1 else ""
    is_local = any(outcome.job.algorithm == "local" for outcome in outcomes)
    caption += " local: mean over its clients' own adapters." if is_local else ""
    label = f"{metric} on held-out records"
    plot_comparison(curves(outcomes, metric), root / "compare.png", label, caption)
    for cost, against in cost_curves(found).items():  # compare-megabytes.png, compare-seconds.png
        path = root / f"compare-{cost.split()[0]}.png"
        plot_comparison(against, path, label, caption, cost)
    print(f"\n{as_text(rows, metric)}\n{found.note}")
    if own:
        print(f"\n{text_table(own_records_lines(own))}\n")
    print(f"  figure {root / 'compare.png'}   table {root / 'compare.md'}, {root / 'compare.csv'}")
    if outcomes[0].job.config.tracking.report:
        if warning := report_or_warning(lambda: write_report(root, found)):
            print(f"  {warning}")
        else:
            print(f"  report {root / REPORT}")


def write_report(root: Path, found: Tabulated | None = None, output: Path | None = None) -> Path:
    """Write the report of a comparison, by default to ``report.html`` in its directory.

    Raises:
        FedLLMError: as `report_page`, or the file cannot be written.
    """
    path = output or root / REPORT
    write_atomically(path, render(report_page(root, found)).encode())
    return path


def report_page(root: Path, found: Tabulated | None = None) -> Page:
    """The report of a comparison's finished runs.

    Args:
        found: the runs' results; None: read them from the directory.

    Raises:
        ConfigError: no run has finished.
    """
    options, overrides = _saved(root)
    if found is None:
        algorithms = _algorithms(options.get("algorithm", "all"), overrides)
        found = Tabulated.of(_jobs_on_disk(root, algorithms), algorithms)
    if found is None:
        raise ConfigError(f"{root}: no run of this comparison has finished yet.")
    own = [f"{key}={value}" for key, value in options.items() if key != "output_dir"]
    facts = replace(run_facts(found.outcomes[0].job.directory), name=root.resolve().name)
    return comparison_page(facts, found, shlex.join(["fedllm", "compare", *own, *overrides]))


def _jobs_on_disk(root: Path, algorithms: Sequence[str]) -> list[Job]:
    """The runs of a comparison's directory, which may have been moved, in `make_jobs`' order."""
    jobs = []
    for path in sorted((root / "runs").glob("*/config.yaml")):
        config = replace(load_run(path.parent, str(path.parent)), output_dir=str(path.parent))
        name = path.parent.name.rpartition("-seed")[0]
        jobs.append(Job(name, config.seed, config=config))
    return sorted(jobs, key=lambda job: (job.seed, algorithms.index(job.algorithm)))
