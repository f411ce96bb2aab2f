"""Results of a comparison's runs and their spread over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from fedllm_flwr.commands.compare.jobs import Job
from fedllm_flwr.config.participation import describe_local
from fedllm_flwr.reporting.measures import MEGABYTES, costs
from fedllm_flwr.reporting.metrics import RoundRecord, name_of_start, read_metrics, summarise
from fedllm_flwr.reporting.personal import own_records_rows
from fedllm_flwr.reporting.plots import Curve
from fedllm_flwr.tasks import table_metrics


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the deviation is None for one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, half of its 95 % t interval over seeds, and the p-value of the
    paired t test.
    """

    mean: float
    half_width: float | None
    p_value: float = 1.0

    @classmethod
    def of(cls, differences: Sequence[float]) -> "Difference | None":
        """The mean of one difference per seed; None without any."""
        if len(differences) < 2:
            return cls(differences[0], None) if differences else None
        from scipy.stats import t

        count = len(differences)
        quantile = float(t.ppf(0.975, count - 1))
        mean, error = fmean(differences), stdev(differences) / math.sqrt(count)
        p_value = float(2 * t.sf(abs(mean) / error, count - 1)) if error else float(not mean)
        return cls(mean, quantile * error, p_value)


@dataclass(frozen=True)
class ComparisonRow:
    """One line of the comparison."""

    name: str
    final: dict[str, Spread]
    best_loss: Spread | None = None
    against_local: Difference | None = None
    steps: float | None = None  # optimizer steps of all clients in all rounds
    megabytes: float | None = None
    seconds: float | None = None
    aggregation_error: float | None = None  # mean over rounds and seeds


@dataclass(frozen=True)
class FinishedRun:
    """One finished run."""

    job: Job
    records: list[RoundRecord]
    summary: dict[str, Any]


@dataclass(frozen=True)
class Tabulated:
    """Results of the finished runs: the rows of the table, the deciding score, and notes for
    readers of the table.
    """

    outcomes: list[FinishedRun]
    rows: list[ComparisonRow]
    metric: str
    note: str

    @classmethod
    def of(cls, jobs: Sequence[Job], algorithms: Sequence[str]) -> "Tabulated | None":
        """The results of the finished jobs; None if there are none."""
        outcomes = read_outcomes(jobs)
        if not outcomes:
            return None
        rows, metric = make_rows(outcomes, algorithms), deciding_metric(outcomes)
        seeds = len({outcome.job.seed for outcome in outcomes})
        note = (
            f"Mean ± standard deviation over {seeds} seed{'s' * (seeds != 1)}. vs local: "
            f"paired difference of the final {metric} by seed, ± half of its 95 % t interval over "
            "seeds, on these records; * significant at a family-wise error rate of 5 % over all "
            "rows (Holm). steps: total optimizer steps of all clients."
        )
        local = [outcome.job.config for outcome in outcomes if outcome.job.algorithm == "local"]
        if local:
            note += f" Local: {describe_local(local[0])}; best and worst client by loss."
        if any(row.aggregation_error is not None for row in rows):
            note += (
                " BA error: distance of the new global B A from the mean of the clients' B A, as "
                "a fraction of its norm; mean over rounds."
            )
        return cls(outcomes, rows, metric, note)

    def on_own_records(self) -> list[ComparisonRow]:
        """Scores on the clients' own held-out records: mean, worst and best client by loss.

        The scores are of the global adapter and of personal adapters, if clients scored them.
        """
        rows = []
        for name in dict.fromkeys(outcome.job.algorithm for outcome in self.outcomes):
            runs = [outcome for outcome in self.outcomes if outcome.job.algorithm == name]
            each = [own_records_rows(run.records) for run in runs]
            for line in zip(*each, strict=False):
                label = line[0][0]
                title = label if label.startswith(" ") else f"{name}: {label.split(',')[0]}"
                rows.append(ComparisonRow(title, _spreads([scores for _, scores in line])))
        return rows


def read_outcomes(jobs: Sequence[Job]) -> list[FinishedRun]:
    """The finished runs."""
    outcomes = []
    for job in jobs:
        if job.done:
            records = read_metrics(job.directory.metrics)
            seconds = [float(record.get("seconds", 0.0)) for record in records]
            outcomes.append(FinishedRun(job, records, summarise(records, {"rounds": sum(seconds)})))
    return outcomes


def make_rows(outcomes: Sequence[FinishedRun], algorithms: Sequence[str]) -> list[ComparisonRow]:
    """Rows of the start and each algorithm in order, with best and worst clients after local."""
    by_name = {
        name: [outcome for outcome in outcomes if outcome.job.algorithm == name]
        for name in algorithms
    }
    rows = []
    federated = next((by_name[name] for name in algorithms if by_name[name]), [])
    if federated:
        first = name_of_start(federated[0].job.config.init_adapter)
        rows.append(
            ComparisonRow(first, _spreads([outcome.summary["base"] for outcome in federated]))
        )
    local = by_name.get("local", [])
    for name, runs in by_name.items():
        if not runs:
            continue
        rows.append(_row(name, runs, local))
        if name == "local":
            for label, choose in (("  best client", min), ("  worst client", max)):
                each = [run.records[-1]["local"].values() for run in runs]
                chosen = [choose(some, key=lambda scores: float(scores["loss"])) for some in each]
                rows.append(ComparisonRow(label, _spreads(chosen)))
    return rows


def deciding_metric(outcomes: Sequence[FinishedRun]) -> str:
    """Metric that ranks algorithms: accuracy if answers are classes, otherwise the loss."""
    scored = all("accuracy" in (outcome.summary["final"] or {}) for outcome in outcomes)
    return "accuracy" if outcomes and scored else "loss"


def _row(name: str, runs: Sequence[FinishedRun], local: Sequence[FinishedRun]) -> ComparisonRow:
    sent = [run.summary["bytes_up"] + run.summary["bytes_down"] for run in runs]
    travels = name not in ("local", "centralized")
    return ComparisonRow(
        name="local (mean)" if name == "local" else name,
        final=_spreads([run.summary["final"] for run in runs]),
        best_loss=Spread.of([run.summary["best"]["loss"] for run in runs]),
        against_local=None if name == "local" else _against(runs, local),
        steps=fmean(_steps(run) for run in runs),
        megabytes=fmean(sent) / 1e6 if travels else 0.0,
        seconds=fmean(run.summary["seconds"] for run in runs),
        aggregation_error=_mean_error(runs),
    )


def _mean_error(runs: Sequence[FinishedRun]) -> float | None:
    found = [record.get("aggregation_error") for run in runs for record in run.records]
    known = [error for error in found if error is not None]
    return fmean(known) if known else None


def _steps(run: FinishedRun) -> float:
    clients = [client for record in run.records for client in record.get("clients", {}).values()]
    return sum(float(client["steps"]) for client in clients)


def _spreads(scores: Sequence[dict[str, float]]) -> dict[str, Spread]:
    return {
        metric: Spread.of([score[metric] for score in scores])
        for metric in table_metrics()
        if all(metric in score for score in scores)
    }


def _against(runs: Sequence[FinishedRun], local: Sequence[FinishedRun]) -> Difference | None:
    """Differences paired by seed, with Student's interval, which assumes normality."""
    metric = deciding_metric([*runs, *local])
    baseline = {run.job.seed: run.summary["final"][metric] for run in local}
    differences = [
        run.summary["final"][metric] - baseline[run.job.seed]
        for run in runs
        if run.job.seed in baseline
    ]
    return Difference.of(differences)


def curves(outcomes: Sequence[FinishedRun], metric: str) -> dict[str, Curve]:
    """Mean, lowest and highest score over seeds, by algorithm and evaluated round."""
    found: dict[str, dict[int, list[float]]] = {}
    for outcome in outcomes:
        of_algorithm = found.setdefault(outcome.job.algorithm, {})
        for record in outcome.records:
            if metric in (record.get("eval") or {}):
                of_algorithm.setdefault(record["round"], []).append(record["eval"][metric])
    return {
        name: [(r, fmean(v), min(v), max(v)) for r, v in sorted(rounds.items())]
        for name, rounds in found.items()
    }


def cost_curves(found: Tabulated) -> dict[str, dict[str, Curve]]:
    """`curves` against the cost (mean over seeds) instead of the round: by cost, then by algorithm.

    As in the table, baselines have no communication cost.
    """
    travels = {row.name for row in found.rows if row.megabytes}
    drawn: dict[str, dict[str, Curve]] = {label: {} for label in costs([])}
    for name, curve in curves(found.outcomes, found.metric).items():
        runs = [outcome for outcome in found.outcomes if outcome.job.algorithm == name]
        for label, some in drawn.items():
            by_round = [
                dict(zip([r["round"] for r in run.records], costs(run.records)[label], strict=True))
                for run in runs
            ]
            spent = [fmean(each[r] for each in by_round if r in each) for r, *_ in curve]
            if spent and spent[-1] > 0 and (label != MEGABYTES or name in travels):
                some[name] = [
                    (x, mean, low, high)
                    for x, (_, mean, low, high) in zip(spent, curve, strict=True)
                ]
    return {label: some for label, some in drawn.items() if some}
