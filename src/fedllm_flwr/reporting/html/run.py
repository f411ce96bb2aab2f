"""The report of one run, from its records as described in `reporting.metrics`."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from fedllm_flwr.config import Config
from fedllm_flwr.reporting.html.page import (
    Bar,
    Block,
    Cell,
    Chart,
    Figure,
    Folded,
    Page,
    Paragraphs,
    Section,
    Series,
    Shares,
    Table,
    spans_decades,
)
from fedllm_flwr.reporting.measures import (
    CONTRIBUTIONS,
    DRIFT,
    client_spread,
    costs,
    deciding_score,
    unrelated_cosine,
)
from fedllm_flwr.reporting.metrics import (
    RoundRecord,
    best_record,
    cut_clients,
    cut_lines,
    name_of_start,
    summarise,
)
from fedllm_flwr.reporting.personal import client_rows
from fedllm_flwr.reporting.table import result_label, summary_rows
from fedllm_flwr.reporting.text import fixed, format_bytes, format_seconds
from fedllm_flwr.tasks import all_metrics, task_of
from fedllm_flwr.tasks.base import TrainingTask

_LABEL = "label:"  # column of clients.csv
_MOST_EVENTS = 200
_ON_LEAVING_OUT = (
    "Leave-one-out per round: the round's server step is repeated without the client's update, "
    "with the others reweighted. Positive: the round was better with it. Effects on later rounds "
    "are not included, and clients with knowledge that others also have get low values."
)
_ON_ALONE = (
    "The server step with only the client's update; lower is better. How updates complement each "
    "other is not included."
)
_ON_COSINES = (
    "Band: lowest to highest client. 1: all updates have the same direction; orthogonal updates: "
    "1/√n for n clients; below zero: opposed to the mean of the others."
)
# Keys of a record with a dedicated place on this page; every other number gets its own chart.
_SHOWN = {
    *("round", "loss", "clients", "failures", "seconds", "bytes_up", "bytes_down", "failed"),
    *("phases", "refused", "lost", "ignored", "evaluation_failures", "local", "client_eval"),
    *("attackers", "refused_updates", "budget_spent", "delta"),
}
# The same for the keys of a client's metrics.
_SHOWN_OF_CLIENTS = {"loss", "num_examples", "computed_tokens"}


@dataclass(frozen=True)
class RunFacts:
    """The data of a run that its report shows.

    Attributes:
        state: running, finished, failed or stopped; ``now`` is a sentence on the current round.
        clients: rows of ``clients.csv``.
        changed: key -> value and default, for keys that differ from their default.
        environment, digests: versions of the software; digests of inputs and results.
        yaml: the complete configuration.
    """

    name: str
    config: Config
    records: Sequence[RoundRecord]
    state: str = "finished"
    now: str = ""
    summary: Mapping[str, Any] | None = None
    clients: Sequence[Mapping[str, str]] = ()
    changed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    yaml: str = ""


def run_page(facts: RunFacts) -> Page:
    """The whole page; sections without data are left out."""
    records = [record for record in facts.records if not record.get("failed")]
    task = task_of(facts.config)
    config, summary = facts.config, facts.summary or summarise(records, {})
    rows, score = _score_rows(facts, summary), deciding_score(records)
    return Page(
        title=f"{config.algorithm.name} on {config.data.name}",
        subtitle=f"Run {facts.name}: {config.task.name}, {config.model.name}, {facts.state}",
        headline=" ".join(filter(None, [_headline(facts, rows, score), facts.now])),
        figures=_figures(facts, summary, rows, score),
        sections=[
            Section("Scores", _scores(rows)),
            Section("Curves", _curves(records, task)),
            Section("Score against cost", _costs(records, score)),
            Section("Clients", _clients(facts, records)),
            Section("Fairness", _fairness(records)),
            Section("Client drift", _drift(records)),
            Section("Contribution", _contributions(records)),
            Section("Time and traffic", _time_and_traffic(records, summary)),
            Section("Further measures", further_charts(records, task)),
            Section("Failures and warnings", _events(facts.records)),
            Section("Configuration", configuration(facts)),
            Section(
                "Reproduction",
                again(
                    facts,
                    ["fedllm run config=config.yaml output_dir=outputs/again"],
                    "Save the whole configuration above as config.yaml, then:",
                ),
            ),
        ],
    )


def _title(score: str) -> str:
    metric = all_metrics().get(score)
    return metric.card_title if metric else score.replace("_", " ")


def _score_rows(facts: RunFacts, summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows of the closing table."""
    label = result_label(facts.config.algorithm.name)
    first = name_of_start(facts.config.init_adapter)
    return summary_rows(summary, client_rows(facts.records), label, first)


def _headline(facts: RunFacts, rows: Sequence[tuple[str, Mapping[str, Any]]], score: str) -> str:
    done = max((int(record["round"]) for record in facts.records), default=0)
    found = {name: metrics[score] for name, metrics in rows if metrics.get(score) is not None}
    first = name_of_start(facts.config.init_adapter)
    label = result_label(facts.config.algorithm.name)
    if done == 0 or not {first, label} <= found.keys():
        return f"{done} of {facts.config.federation.num_rounds} rounds are done."
    before, after = found[first], found[label]
    decimals = all_metrics()[score].card_decimals
    return (
        f"After {done} rounds the {_title(score)} on held-out records is {after:.{decimals}f}; "
        f"the {first} model had {before:.{decimals}f}."
    )


def _figures(
    facts: RunFacts,
    summary: Mapping[str, Any],
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    score: str,
) -> list[Figure]:
    records, config = facts.records, facts.config
    figures = []
    base, final = summary.get("base") or {}, summary.get("final") or {}
    for name in dict.fromkeys((score, "loss")):
        if final.get(name) is not None and all_metrics().get(name):
            decimals = all_metrics()[name].card_decimals
            before = f"from {fixed(base.get(name), decimals)}" if base else ""
            figures.append(Figure(_title(name), fixed(final[name], decimals), before))
    trained = [record["loss"] for record in records if record.get("loss") is not None]
    if not final and trained:
        figures.append(Figure("training loss", fixed(trained[-1], 3)))
    if best := best_record(records):
        loss = (best.get("eval") or best.get("client_eval") or {}).get("loss")
        figures.append(Figure("best round", str(best["round"]), f"loss {fixed(loss, 3)}"))
    done = max((int(record["round"]) for record in records), default=0)
    figures.append(Figure("rounds", f"{done} of {config.federation.num_rounds}"))
    replies = sum(len(record.get("clients") or {}) for record in records)
    missing = sum(len(record.get("failures") or {}) for record in records)
    names = {name for record in records for name in record.get("clients") or {}}
    known = max(len(facts.clients), len(names))
    figures.append(Figure("clients", str(known), f"{len(names)} took part"))
    figures.append(Figure("updates used", str(replies), f"{missing} missing or refused"))
    up, down = summary.get("bytes_up", 0), summary.get("bytes_down", 0)
    figures.append(Figure("moved", format_bytes(up + down), f"{format_bytes(up)} up"))
    seconds = float(summary.get("seconds") or sum(r.get("seconds", 0.0) for r in records))
    figures.append(Figure("time", format_seconds(seconds)))
    if "epsilon" in summary:
        epsilon, promise = summary["epsilon"], f"at delta {summary['delta']:.2g}"
        spent = "unbounded" if epsilon is None or math.isinf(epsilon) else f"{epsilon:.3g}"
        figures.append(
            Figure("privacy spent", f"ε {spent}", f"{promise}, per {config.privacy.unit}")
        )
    if config.privacy.secure_aggregation:
        figures.append(Figure("secure aggregation", "on", "the server saw sums only"))
    return figures


def _scores(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Block]:
    shown = [
        metric
        for name, metric in all_metrics().items()
        if any(metrics.get(name) is not None for _, metrics in rows)
    ]
    if not shown:
        return []
    body = [
        [label, *(fixed(metrics.get(m.name), m.card_decimals) for m in shown)]
        for label, metrics in rows
    ]
    return [Table(["", *(metric.card_title for metric in shown)], body)]


def _curves(records: Sequence[RoundRecord], task: TrainingTask) -> list[Block]:
    """Charts of the loss and the task's panels, as in the figure of `reporting.plots`."""
    trained = [record for record in records if record.get("loss") is not None]
    lines = []
    if trained:
        each = [[m.get("loss") for m in record["clients"].values()] for record in trained]
        ends = [[loss for loss in losses if loss is not None] for losses in each]
        lines.append(
            Series(
                "training, mean of clients",
                [record["round"] for record in trained],
                [record["loss"] for record in trained],
                [min(losses, default=None) for losses in ends],
                [max(losses, default=None) for losses in ends],
            )
        )
    for section, name in (("eval", "held-out records"), ("client_eval", "clients' own held-out")):
        lines += _lines(records, section, {"loss": name})
    note = "Band: lowest to highest client." if trained else ""
    charts: list[Block] = []
    if lines:
        charts.append(
            Chart("Loss", lines, y_label=task.loss_unit, log=spans_decades(lines), note=note)
        )
    for panel in task.panels:
        if scores := _lines(records, "eval", {key: _title(key) for key in panel.keys}):
            charts.append(Chart(panel.title, scores, y_label=panel.unit, limits=panel.limits))
    return charts


def _lines(records: Sequence[RoundRecord], section: str, names: Mapping[str, str]) -> list[Series]:
    """Lines of scores by round from a section of the records; `names` maps keys to line names."""
    found = []
    for key, name in names.items():
        points = [
            (record["round"], record[section][key])
            for record in records
            if (record.get(section) or {}).get(key) is not None
        ]
        if points:
            found.append(Series(name, [x for x, _ in points], [y for _, y in points]))
    return found


def _costs(records: Sequence[RoundRecord], score: str) -> list[Block]:
    scored = [
        (i, r["eval"][score]) for i, r in enumerate(records) if score in (r.get("eval") or {})
    ]
    if len(scored) < 2:
        return []
    charts: list[Block] = []
    for label, spent in costs(records).items():
        if spent[-1] > 0:
            line = Series(_title(score), [spent[i] for i, _ in scored], [y for _, y in scored])
            title = f"{_title(score).capitalize()} against {label}"
            charts.append(
                Chart(title, [line], label, log=score == "loss" and spans_decades([line]))
            )
    return charts


def _clients(facts: RunFacts, records: Sequence[RoundRecord]) -> list[Block]:
    """A table with a row per client, and a chart of their losses."""
    sizes = {row["client"]: row for row in facts.clients if row.get("client")}
    series: dict[str, list[tuple[int, Mapping[str, float]]]] = defaultdict(list)
    failures: dict[str, list[str]] = defaultdict(list)
    own: dict[str, float] = {}
    for record in records:
        more = _by_client(record)
        for name, metrics in (record.get("clients") or {}).items():
            own_more = {key: some[name] for key, some in more.items() if name in some}
            series[name].append((record["round"], {**metrics, **own_more}))
        for name, why in {**(record.get("failures") or {}), **record.get("refused", {})}.items():
            failures[name].append(why)
        for name, scores in (record.get("client_eval") or {}).get("clients", {}).items():
            own[name] = scores.get("loss")
    names = sorted({*sizes, *series, *failures, *own})
    if not names:
        return []
    means = {
        key: key.replace("_", " ")
        for some in series.values()
        for _, metrics in some
        for key in metrics
        if key not in _SHOWN_OF_CLIENTS
    }
    has_labels = any(key.startswith(_LABEL) for row in sizes.values() for key in row)
    header = ["client", "records", *(["labels"] if has_labels else [])]
    header += ["rounds", "missing", "first loss", "last loss", *(["own held-out"] if own else [])]
    header += [f"{title}, mean" for title in means.values()]
    rows: list[list[Cell]] = []
    for name in names:
        some = series[name]
        cells: list[Cell] = [name, sizes.get(name, {}).get("examples", "-")]
        cells += [_labels(sizes.get(name, {}))] if has_labels else []
        cells += [str(len(some)), str(len(failures[name]))]
        losses = [metrics.get("loss") for _, metrics in some]
        cells += [fixed(losses[0], 3), fixed(losses[-1], 3)] if losses else ["-", "-"]
        cells += [fixed(own.get(name), 3)] if own else []
        for key in means:
            values = [metrics[key] for _, metrics in some if metrics.get(key) is not None]
            cells.append(f"{fmean(values):.4g}" if values else "-")
        rows.append(cells)
    blocks: list[Block] = [Table(header, rows, note=_note_on_clients(bool(own)))]
    lines = [
        Series(name, [number for number, _ in some], [metrics.get("loss") for _, metrics in some])
        for name, some in sorted(series.items())
        if any(metrics.get("loss") is not None for _, metrics in some)
    ]
    if len(lines) > 1:
        blocks.append(Chart("Training loss of each client", lines, log=spans_decades(lines)))
    return blocks


def _note_on_clients(has_own: bool) -> str:
    note = "missing: updates that did not arrive or were refused. Losses are from local training."
    return note + (" own held-out: loss of the newest adapter on its own records." * has_own)


def _labels(row: Mapping[str, str]) -> Cell:
    counts = {k.removeprefix(_LABEL): v for k, v in row.items() if k and k.startswith(_LABEL)}
    return Shares([(label, float(count or 0)) for label, count in counts.items()])


def _fairness(records: Sequence[RoundRecord]) -> list[Block]:
    """The spread of clients: on their own held-out records or, for algorithm=local, of adapters."""
    each = [(record["round"], spread) for record in records if (spread := client_spread(record))]
    if not each:
        return []
    rounds, last = [number for number, _ in each], each[-1][1]
    score, best, worst = last.metric, last.ranked[0], last.ranked[-1]
    rows = [
        [f"best client ({best})", fixed(last.best, 3)],
        [f"worst client ({worst})", fixed(last.worst, 3)],
        ["mean of clients", fixed(last.mean, 3)],
        ["spread, best to worst", fixed(last.range, 3)],
        ["standard deviation over clients", fixed(last.deviation, 3)],
    ]
    alone = any(record.get("local") for record in records)
    where = "the shared held-out records" if alone else "their own held-out records"
    mean, low, high = (
        [choose(spread.values.values()) for _, spread in each] for choose in (fmean, min, max)
    )
    lines = [
        Series("mean of clients", rounds, mean, low, high),
        Series("worst client", rounds, [spread.worst for _, spread in each]),
    ]
    title = f"{_title(score).capitalize()} of clients on {where}"
    note = "Band: lowest to highest client."
    return [
        Table([f"after round {rounds[-1]}", _title(score)], rows),
        Chart(title, lines, log=score == "loss" and spans_decades(lines), note=note),
    ]


def _drift(records: Sequence[RoundRecord]) -> list[Block]:
    """Client drift: cosines and norms of the updates of each round."""
    charts: list[Block] = []
    for key, title, note in (
        ("update_cosine", "Cosine of each update to the mean of its round", _ON_COSINES),
        ("update_norm", "Norm of each update", "Band: lowest to highest client."),
    ):
        points = [(r["round"], [*r[key].values()]) for r in records if r.get(key)]
        if not points:
            continue
        rounds = [number for number, _ in points]
        mean, low, high = ([choose(v) for _, v in points] for choose in (fmean, min, max))
        lines = [Series("mean of clients", rounds, mean, low, high)]
        if key == "update_cosine":
            unrelated = [unrelated_cosine(len(values)) for _, values in points]
            lines.append(Series("unrelated directions", rounds, unrelated))
        charts.append(Chart(title, lines, note=note))
    return charts


def _contributions(records: Sequence[RoundRecord]) -> list[Block]:
    """Each client's contribution, measured by the loss on the central held-out records."""
    blocks: list[Block] = []
    for key, title, note in (
        ("leave_one_out", "loss without it minus loss with it, mean", _ON_LEAVING_OUT),
        ("update_alone", "loss with only its update, mean", _ON_ALONE),
    ):
        each: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for record in records:
            for name, value in (record.get(key) or {}).items():
                if value is not None:
                    each[name].append((record["round"], value))
        if not each:
            continue
        means = {name: fmean(value for _, value in points) for name, points in each.items()}
        ranked = sorted(means, key=lambda name: means[name], reverse=key == "leave_one_out")
        rows: list[list[Cell]] = [
            [name, Bar(f"{means[name]:+.4f}", means[name]), str(len(each[name]))] for name in ranked
        ]
        blocks.append(Table(["client", title, "rounds scored"], rows, note=note))
    return blocks


def _time_and_traffic(records: Sequence[RoundRecord], summary: Mapping[str, Any]) -> list[Block]:
    phases: dict[str, float] = dict(summary.get("phases") or {})
    if not phases:
        for record in records:
            for name, seconds in (record.get("phases") or {}).items():
                phases[name] = phases.get(name, 0.0) + seconds
    blocks: list[Block] = []
    if total := math.fsum(phases.values()):
        ordered = sorted(phases.items(), key=lambda item: -item[1])
        rows: list[list[Cell]] = [
            [name, Bar(format_seconds(seconds), seconds), f"{seconds / total:.0%}"]
            for name, seconds in ordered
        ]
        blocks.append(Table(["phase", "time", "share"], rows))
    trained = [record for record in records if record["round"] > 0]
    if not trained:
        return blocks
    rounds = [record["round"] for record in trained]
    blocks.append(
        Chart(
            "Time of each round",
            [Series("training and federation", rounds, [r.get("seconds") for r in trained])],
            y_label="seconds, evaluation and checkpoints excluded",
        )
    )
    moved = [
        Series(name, rounds, [record.get(key, 0) / 1e6 for record in trained])
        for name, key in (("to clients", "bytes_down"), ("from clients", "bytes_up"))
    ]
    blocks.append(Chart("Traffic of each round", moved, y_label="megabytes of tensors"))
    return blocks


def _by_client(record: RoundRecord) -> dict[str, Mapping[str, float]]:
    """Measures with a number per client that have no dedicated place on the page."""
    names = (record.get("clients") or {}).keys()
    return {
        key: value
        for key, value in record.items()
        if key not in _SHOWN and isinstance(value, Mapping) and value and value.keys() <= names
    }


def scalar_series(records: Sequence[RoundRecord]) -> list[tuple[str, list[tuple[int, float]]]]:
    """Numbers of records that have no dedicated place on the page: name and (round, value).

    A section such as ``privacy: {epsilon: 2.9}`` gives the name "privacy epsilon".
    """
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in records:
        for key, value in record.items():
            if key not in _SHOWN and key not in _by_client(record):
                for name, number in _numbers(key.replace("_", " "), value):
                    found[name].append((record["round"], number))
    return list(found.items())


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{name} {key}".replace("_", " "), inner)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield name, value


def further_charts(records: Sequence[RoundRecord], task: TrainingTask) -> list[Block]:
    """Charts of all numbers that are not shown elsewhere, so new measures appear automatically."""
    shown = {"loss", *(key for panel in task.panels for key in panel.keys)}
    known = {f"eval {key}".replace("_", " ") for key in shown}
    charts: list[Block] = []
    by_client = {key: key.replace("_", " ") for record in records for key in _by_client(record)}
    for key, title in by_client.items():
        if key in (*DRIFT, *CONTRIBUTIONS):
            continue
        points = [(r["round"], [*r[key].values()]) for r in records if key in _by_client(r)]
        rounds = [number for number, _ in points]
        mean, low, high = ([choose(v) for _, v in points] for choose in (fmean, min, max))
        line = Series("mean of clients", rounds, mean, low, high)
        charts.append(Chart(title, [line], note="Band: lowest to highest client."))
    return charts + [
        Chart(
            name.replace("eval ", "held-out "),
            [Series(name, [number for number, _ in points], [value for _, value in points])],
        )
        for name, points in scalar_series(records)
        if name not in known and len(points) > 1
    ]


def _events(records: Sequence[RoundRecord]) -> list[Block]:
    """Repeatedly cut clients, missing updates, refused clients and lost memory."""
    rows = []
    for record in records:
        number = str(record["round"])
        for key, text in (
            ("refused", "cannot take part: {}"),
            ("failures", "{}"),
            ("evaluation_failures", "no scores: {}"),
            ("lost", "lost its memory of round {} and started anew"),
        ):
            for name, why in (record.get(key) or {}).items():
                rows.append([number, name, text.format(why)])
        rows += [[number, "-", line] for line in record.get("ignored", [])]
        if record.get("failed"):
            rows.append([number, "-", "the run failed in this round"])
    named = [f"{line}." for line in cut_lines(cut_clients(records))]
    blocks: list[Block] = [Paragraphs(named)] if named else []
    if not rows:
        whole = "None: every sampled client sent a usable update."
        return blocks or [Paragraphs([whole])]
    left = len(rows) - _MOST_EVENTS
    note = f"The last {_MOST_EVENTS} of {len(rows)}; all are in metrics.jsonl." * (left > 0)
    return [*blocks, Table(["round", "client", "what"], rows[-_MOST_EVENTS:], note=note)]


def configuration(facts: RunFacts) -> list[Block]:
    """The configuration: differences from the defaults, and all keys."""
    rows = [[key, value, default] for key, (value, default) in facts.changed.items()]
    blocks: list[Block] = [Paragraphs(["Every value is the default of fedllm run."])]
    if rows:
        blocks = [Table(["differs from fedllm run", "value", "default"], rows)]
    if facts.yaml:
        blocks.append(
            Folded("Whole configuration", [Paragraphs(facts.yaml.splitlines(), code=True)])
        )
    return blocks


def again(facts: RunFacts, commands: Sequence[str], first: str = "") -> list[Block]:
    """Reproduction: commands, versions, digests."""
    blocks: list[Block] = [Paragraphs([first])] if first else []
    blocks.append(Paragraphs(commands, code=True))
    for title, values in (("software", facts.environment), ("SHA-256", facts.digests)):
        if values:
            blocks.append(Table([title, ""], [[name, value] for name, value in values.items()]))
    return blocks
