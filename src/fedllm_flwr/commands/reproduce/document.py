"""Tables and figures of a reproduction, from its document of plain numbers alone."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedllm_flwr.commands.evaluate.comparison import LOCAL
from fedllm_flwr.commands.evaluate.tables import UNPARSABLE
from fedllm_flwr.evaluation.suites.statistics import clear_together
from fedllm_flwr.files import write_atomically
from fedllm_flwr.reporting.text import fixed, markdown_table

TABLES = "results.md"
_BESIDE = ("macro F1", UNPARSABLE)  # metrics shown beside each task's headline
_BASELINES = ("local", "centralized")  # what they send is the simulation's, no federation's
_NOTES = (
    "± half of the 95 % interval over seeds and examples (Student's t), over examples only where "
    "there is one seed (bootstrap). Differences from local are paired by seed and example; * not "
    "zero, at 5 % for all differences of the table together (Holm), † the same over examples only, "
    "which holds for these adapters and not for another seed's.",
    "validation loss: of the round with the lowest one, whose adapter is tested; mean ± standard "
    "deviation over seeds. steps: optimizer steps of all clients together. BA error: distance of "
    "the global B A from the mean of the clients' products, as a share of it.",
)

Numbers = dict[str, Any]


def write_document(document: Numbers, folder: Path) -> list[str]:
    """Write ``results.md`` and the figures; returns the tables as lines for a terminal."""
    sections = _sections(document)
    setting = ", ".join(f"{key} {value}" for key, value in document["setting"].items())
    head = [
        f"# {document['experiment']}, {document['model']}",
        f"`{document['command']}`",
        f"{document['date']}, on {document['device']}; {setting}",
    ]
    body = [f"## {title}\n\n{markdown_table(table)}" for title, table in sections]
    text = "\n\n".join([*head, *body, *_NOTES]) + "\n"
    write_atomically(folder / TABLES, text.encode())
    _draw(document, folder)
    return [text, f"tables {folder / TABLES}   figures {folder}/*.png"]


def seed_name(seed: int | None) -> str:
    """Key of a seed in ``by_seed``; a dash for the base model, which has none."""
    return "-" if seed is None else str(seed)


def _sections(document: Numbers) -> list[tuple[str, list[list[str]]]]:
    found = []
    if document["test"]:
        found += [
            ("Test", _test_table(document)),
            ("Difference from local", _differences(document)),
            ("Test, the values of the seeds", _seeds_table(document)),
        ]
    if document["test"] and document["published"]:
        found.append(("Beside published figures", published_table(document)))
    if document["runs"]:
        found.append(("Training", _training_table(document["runs"])))
    found.append(("Search, on the first seed", _trials_table(document["trials"])))
    return [(title, table) for title, table in found if len(table) > 1]


def _shown(document: Numbers) -> list[tuple[str, str]]:
    """(task, metric) of the columns: each headline, then macro F1 and the unparsable share."""
    tests = document["test"]
    return [
        *dict.fromkeys((one["task"], one["metric"]) for one in tests if one["headline"]),
        *dict.fromkeys(
            (one["task"], one["metric"])
            for metric in _BESIDE
            for one in tests
            if one["metric"] == metric and not one["headline"]
        ),
    ]


def _test_table(document: Numbers) -> list[list[str]]:
    rows = dict.fromkeys(one["model"] for one in document["test"])
    columns = _shown(document)
    table = [["", *(f"{task}, {metric}" for task, metric in columns)]]
    for row in rows:
        cells = []
        for column in columns:
            one = _number(document, row, *column)
            half = 0.0 if one is None else (one["high"] - one["low"]) / 2
            cells.append("-" if one is None else f"{one['value']:.3f} ± {half:.3f}")
        table.append([row, *cells])
    return table


def _seeds_table(document: Numbers) -> list[list[str]]:
    """Values of models with several seeds, in the order of the seeds."""
    columns = _shown(document)
    table = [["", *(f"{task}, {metric}" for task, metric in columns)]]
    for row in dict.fromkeys(one["model"] for one in document["test"]):
        numbers = [_number(document, row, *column) for column in columns]
        each = [dict(one.get("by_seed", {})) if one else {} for one in numbers]
        if max(map(len, each)) > 1:
            ordered = [[f"{values[seed]:.2f}" for seed in sorted(values)] for values in each]
            table.append([row, *(", ".join(values) or "-" for values in ordered)])
    return table


def _differences(document: Numbers) -> list[list[str]]:
    """Differences from the local baseline by headline; Holm's correction over all of them."""
    columns = [column for column in _shown(document) if column[1] != UNPARSABLE]
    rows = dict.fromkeys(one["model"] for one in document["test"])
    found = {
        (row, column): one[f"vs_{LOCAL}"]
        for row in rows
        for column in columns
        if (one := _number(document, row, *column)) is not None and one[f"vs_{LOCAL}"]
    }
    clear = dict(zip(found, clear_together([d[4] for d in found.values()]), strict=True))
    table = [["", *(f"{task}, {metric}" for task, metric in columns)]]
    for row in rows:
        cells = []
        for column in columns:
            if (row, column) not in found:
                cells.append("-")
                continue
            value, low, high, over, _ = found[row, column]
            mark = ("†" if over == "examples" else "*") if clear[row, column] else ""
            cells.append(f"{value:+.3f} ± {(high - low) / 2:.3f} {mark}".rstrip())
        if any(cell != "-" for cell in cells):
            table.append([row, *cells])
    return table


def published_table(document: Numbers) -> list[list[str]]:
    """A row for each published figure: our figure of the same method, and how it compares.

    An entry of ``published`` holds ``system``, ``model``, ``method``, ``metric``, ``source`` and
    ``scores`` by task, as fractions. Where the base model is ours, a figure is passed (missed) if
    our interval lies above (below) it, otherwise met.
    """
    table = [["task", "metric", "system", "model", "method", "published", "ours", ""]]
    for entry in document["published"]:
        for task, value in entry["scores"].items():
            one = _number(document, entry["method"], task, entry["metric"])
            ours, verdict = "-", "not run"
            if one is not None:
                low, high = _interval(one)
                ours = f"{one['value']:.3f} [{low:.3f}, {high:.3f}]"
                verdict = "other model"
                if entry["model"] == document["model"]:
                    verdict = "passed" if low > value else "missed" if high < value else "met"
            about = [entry["system"], entry["model"], entry["method"]]
            table.append([task, entry["metric"], *about, f"{value:.3f}", ours, verdict])
    return table


def _interval(one: Numbers) -> tuple[float, float]:
    """The 95 % interval of a score; if no example is right, or all are, Clopper and Pearson's.

    The bootstrap, and Student's t over equal seeds, have no width then.
    """
    if one["value"] not in (0.0, 1.0) or not one.get("examples"):
        return one["low"], one["high"]
    open_end = 0.025 ** (1 / one["examples"])
    return (0.0, 1.0 - open_end) if one["value"] == 0.0 else (open_end, 1.0)


def _training_table(runs: Sequence[Numbers]) -> list[list[str]]:
    table = [["", "setting", "validation loss", "round", "steps", "MB", "BA error", "s", "seeds"]]
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        losses = [run["validation"]["loss"] for run in own]
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        errors = [run["aggregation_error"] for run in own]
        known = [error for error in errors if error is not None]
        is_federated = not method.startswith(_BASELINES)
        megabytes = f"{fmean(run['megabytes'] for run in own):.1f}" if is_federated else "-"
        table.append(
            [
                method,
                _setting(own[0]),
                f"{fmean(losses):.4f}{spread}",
                f"{fmean(run['validation']['round'] for run in own):.0f}",
                f"{fmean(run['steps'] for run in own):.0f}",
                megabytes,
                fixed(fmean(known), 3) if known and is_federated else "-",
                f"{fmean(run['seconds'] for run in own):.0f}",
                str(len(own)),
            ]
        )
    return table


def _trials_table(trials: Sequence[Numbers]) -> list[list[str]]:
    table = [["", "trial", "setting", "validation loss", "round"]]
    order = list(dict.fromkeys(trial["method"] for trial in trials))
    for trial in sorted(trials, key=lambda one: order.index(one["method"])):
        scores = trial["validation"]
        numbers = [f"{scores['loss']:.4f}", str(scores["round"])]
        table.append([trial["method"], str(trial["trial"] + 1), _setting(trial), *numbers])
    return table


def _setting(run: Numbers) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in run["setting"].items())


def _number(document: Numbers, row: str, task: str, metric: str) -> Numbers | None:
    wanted = (row, task, metric)
    for one in document["test"]:
        if (one["model"], one["task"], one["metric"]) == wanted:
            return dict(one)
    return None


def _draw(document: Numbers, folder: Path) -> None:
    """The test's headlines as bars, and the validation losses over the rounds."""
    from fedllm_flwr.reporting.plots import plot_bars, plot_comparison

    curves = {}
    for method in dict.fromkeys(run["method"] for run in document["runs"]):
        of_rounds: dict[int, list[float]] = {}
        for run in document["runs"]:
            for number, loss in run["curve"] if run["method"] == method else ():
                of_rounds.setdefault(number, []).append(loss)
        curves[method] = [(r, fmean(v), min(v), max(v)) for r, v in sorted(of_rounds.items())]
    if curves:
        caption = "Lines: mean over seeds. Bands: lowest to highest seed."
        plot_comparison(curves, folder / "validation.png", "validation loss", caption)
    columns = [column for column in _shown(document) if column[1] != UNPARSABLE]
    if columns:
        rows = dict.fromkeys(one["model"] for one in document["test"])
        numbers = {row: [_number(document, row, *column) for column in columns] for row in rows}
        bars = {
            row: [None if one is None else (one["value"], one["low"], one["high"]) for one in found]
            for row, found in numbers.items()
        }
        columns_of = zip(*numbers.values(), strict=True)
        chances = [next((o["chance"] for o in some if o), None) for some in columns_of]
        names = [f"{task}, {metric}" for task, metric in columns]
        plot_bars(names, bars, chances, folder / "test.png", document["experiment"])
