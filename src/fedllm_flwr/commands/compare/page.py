"""The report of a comparison: its table, with intervals and curves."""

from collections.abc import Sequence

from fedllm_flwr.commands.compare.results import (
    ComparisonRow,
    FinishedRun,
    Tabulated,
    cost_curves,
    curves,
)
from fedllm_flwr.commands.compare.table import lines_of, own_records_lines
from fedllm_flwr.reporting.html.page import (
    Bar,
    Block,
    Cell,
    Chart,
    Figure,
    Page,
    Section,
    Series,
    Table,
    spans_decades,
)
from fedllm_flwr.reporting.html.run import RunFacts, again, configuration
from fedllm_flwr.reporting.text import fixed, format_seconds
from fedllm_flwr.tasks import all_metrics

_BASELINES = ("base", "start", "local (mean)", "centralized")


def comparison_page(facts: RunFacts, found: Tabulated, command: str) -> Page:
    """The whole page.

    Args:
        facts: configuration and software of one run, under the comparison's name.
        command: the command that reproduces the comparison.
    """
    config, outcomes, rows, metric = facts.config, found.outcomes, found.rows, found.metric
    seeds = sorted({outcome.job.seed for outcome in outcomes})
    title = all_metrics()[metric].card_title
    header, *body = lines_of(rows, metric)
    return Page(
        title=f"Algorithms on {config.data.name}",
        subtitle=f"Comparison {facts.name}: {config.task.name}, {config.model.name}, "
        f"{len(outcomes)} runs",
        headline=_headline(rows, metric),
        figures=[
            Figure("algorithms", str(len({outcome.job.algorithm for outcome in outcomes}))),
            Figure("seeds", str(len(seeds)), ", ".join(map(str, seeds[:8]))),
            Figure("rounds", str(config.federation.num_rounds)),
            Figure("time", format_seconds(sum(o.summary["seconds"] for o in outcomes)), "all runs"),
        ],
        sections=[
            Section("Results", [Table(header, body, note=found.note), _scores(rows, metric)]),
            Section(
                "Paired differences from local",
                _differences(rows, [line[header.index(f"{metric} vs local")] for line in body]),
            ),
            Section("On the clients' own records", _own_records(found)),
            Section("Curves", _curves(found)),
            Section("Runs", [_runs(outcomes, metric, title)]),
            Section("Configuration", configuration(facts)),
            Section("Reproduction", again(facts, [command])),
        ],
    )


def _headline(rows: Sequence[ComparisonRow], metric: str) -> str:
    """The best federated algorithm and the baselines, by the deciding score."""
    scored = {row.name: row.final[metric] for row in rows if metric in row.final}
    federated = [n for n in scored if n not in _BASELINES and not n.startswith(" ")]
    if not federated:
        return ""
    best = (min if metric == "loss" else max)(federated, key=lambda name: scored[name].mean)
    others = [f"{n} {scored[n].mean:.3f}" for n in _BASELINES if n in scored]
    beside = f"; {', '.join(others)}" if others else ""
    sentence = (
        f"The best federated algorithm is {best} with a mean "
        f"{all_metrics()[metric].card_title} of {scored[best].mean:.3f}{beside}."
    )
    difference = next(row.against_local for row in rows if row.name == best)
    if difference is not None and difference.half_width is not None:
        sentence += (
            f" Its difference from local is {difference.mean:+.3f} ± {difference.half_width:.3f} "
            "(95 %, paired by seed)."
        )
    return sentence


def _scores(rows: Sequence[ComparisonRow], metric: str) -> Table:
    body: list[list[Cell]] = []
    for row in rows:
        if (spread := row.final.get(metric)) is not None:
            half = spread.deviation
            ends = () if half is None else (spread.mean - half, spread.mean + half)
            body.append([row.name, Bar(fixed(spread.mean, 3), spread.mean, *ends)])
    name = all_metrics()[metric].card_title
    return Table(["", name], body, note="Whiskers: ± one standard deviation over seeds.")


def _differences(rows: Sequence[ComparisonRow], texts: Sequence[str]) -> list[Block]:
    """The table's column of differences as bars; `texts` have the stars."""
    drawn: list[list[Cell]] = []
    for row, text in zip(rows, texts, strict=True):
        if (difference := row.against_local) is not None:
            half = difference.half_width
            ends = () if half is None else (difference.mean - half, difference.mean + half)
            drawn.append([row.name, Bar(text.strip(), difference.mean, *ends)])
    return [Table(["", "difference"], drawn, note="Whiskers: 95 % t interval.")] if drawn else []


def _own_records(found: Tabulated) -> list[Block]:
    """Scores on the clients' own held-out records, if they were evaluated."""
    rows = found.on_own_records()
    if not rows:
        return []
    header, *body = own_records_lines(rows)
    return [Table(["", *header[1:]], body)]


def _curves(found: Tabulated) -> list[Block]:
    """The deciding score by round, and against the cost (mean over seeds)."""
    by_round = curves(found.outcomes, found.metric)
    colors = {name: number for number, name in enumerate(by_round)}
    title = all_metrics()[found.metric].card_title.capitalize()
    note = "Lines: mean over seeds. Bands: lowest to highest seed."
    charts: list[Block] = []
    for label, some in {"round": by_round, **cost_curves(found)}.items():
        lines = []
        for name, curve in some.items():
            x, mean, low, high = map(list, zip(*curve, strict=True))
            lines.append(Series(name, x, mean, low, high, colors[name]))
        log = found.metric == "loss" and spans_decades(lines)
        joint = "by" if label == "round" else "against"
        charts.append(Chart(f"{title} {joint} {label}", lines, label, log=log, note=note))
    return charts


def _runs(outcomes: Sequence[FinishedRun], metric: str, title: str) -> Table:
    body = [
        [
            outcome.job.directory.path.name,
            str(outcome.job.seed),
            fixed((outcome.summary["final"] or {}).get(metric), 3),
            str(outcome.summary["rounds"]),
            str(outcome.summary["failures"]),
            f"{outcome.summary['seconds']:.0f}",
        ]
        for outcome in outcomes
    ]
    return Table(["run", "seed", title, "rounds", "missing updates", "seconds"], body)
