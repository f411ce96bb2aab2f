"""The arithmetic, the runs and the table of a comparison."""

import csv
import io
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fedllm_flwr.commands.compare.command import COMPARED, compare
from fedllm_flwr.commands.compare.jobs import Job, make_jobs
from fedllm_flwr.commands.compare.page import comparison_page
from fedllm_flwr.commands.compare.results import (
    FinishedRun,
    Tabulated,
    curves,
    deciding_metric,
    make_rows,
)
from fedllm_flwr.commands.compare.table import as_csv, as_markdown, as_text, lines_of
from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import compose
from fedllm_flwr.config.participation import num_sampled
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.reporting.html.page import Bar, Chart, Table
from fedllm_flwr.reporting.html.run import RunFacts
from fedllm_flwr.reporting.metrics import summarise

# Student's t for a two-sided 95 % interval with two degrees of freedom, from a printed table.
T_2 = 4.302653


def _outcome(algorithm: str, seed: int, accuracy: float, **local: float) -> FinishedRun:
    """A run of two rounds; `local` gives the accuracies of clients that trained alone."""
    final = {"loss": 1 - accuracy, "accuracy": accuracy, "macro_f1": accuracy / 2}
    clients = {name: {"steps": 10.0} for name in (*local, "z")}
    last = {"round": 2, "seconds": 3.0, "bytes_up": 2_000_000, "bytes_down": 1_000_000}
    last["clients"] = clients
    records = [
        {"round": 0, "seconds": 0.0, "eval": {"loss": 2.0, "accuracy": 0.25, "macro_f1": 0.2}},
        {"round": 1, "seconds": 0.0, "clients": clients},
        {**last, "eval": final},
    ]
    if local:
        records[-1]["local"] = {
            name: {"loss": 1 - value, "accuracy": value, "macro_f1": value}
            for name, value in local.items()
        }
    config = compose(["federation.engine=inprocess"])
    return FinishedRun(
        Job(algorithm, seed, config=config), records, summarise(records, {"rounds": 3.0})
    )


@pytest.fixture
def outcomes() -> list[FinishedRun]:
    return [
        *(_outcome("local", s, 0.5 + 0.01 * s, a=0.4, b=0.6 + 0.02 * s) for s in range(3)),
        *(_outcome("fedavg", s, 0.8 + 0.02 * s) for s in range(3)),
    ]


def test_rows_hold_mean_and_deviation_over_seeds(outcomes: list[FinishedRun]) -> None:
    rows = {row.name: row for row in make_rows(outcomes, ["local", "fedavg"])}
    assert list(rows) == ["base", "local (mean)", "  best client", "  worst client", "fedavg"]
    fedavg = rows["fedavg"]
    assert fedavg.final["accuracy"].mean == pytest.approx((0.8 + 0.82 + 0.84) / 3)
    assert fedavg.final["accuracy"].deviation == pytest.approx(0.02)
    assert fedavg.megabytes == pytest.approx(3.0)
    assert fedavg.steps == 2 * 10  # one client in each of two rounds
    assert rows["local (mean)"].steps == 2 * 30
    assert rows["local (mean)"].megabytes == 0
    assert rows["base"].final["loss"].mean == pytest.approx(2.0)
    assert rows["  best client"].final["accuracy"].mean == pytest.approx(0.62)
    assert rows["  worst client"].final["accuracy"].mean == pytest.approx(0.4)
    resumed = [
        replace(
            outcome,
            job=replace(
                outcome.job, config=replace(outcome.job.config, init_adapter="earlier/adapter")
            ),
        )
        for outcome in outcomes
    ]
    assert make_rows(resumed, ["local", "fedavg"])[0].name == "start"


def test_difference_to_local_is_paired_by_seed(outcomes: list[FinishedRun]) -> None:
    row = make_rows(outcomes, ["local", "fedavg"])[-1]
    differences = [0.30, 0.31, 0.32]
    deviation = math.sqrt(sum((d - 0.31) ** 2 for d in differences) / 2)
    assert row.against_local is not None
    assert row.against_local.mean == pytest.approx(0.31)
    assert row.against_local.half_width == pytest.approx(T_2 * deviation / math.sqrt(3), rel=1e-5)
    ratio = 0.31 / (deviation / math.sqrt(3))  # t with two degrees of freedom has a closed form
    assert row.against_local.p_value == pytest.approx(1 - ratio / math.sqrt(2 + ratio**2))
    assert "+0.310 ± 0.025 *" in as_text([row], "accuracy")


def test_one_seed_gives_no_interval_and_no_star(outcomes: list[FinishedRun]) -> None:
    alone = [outcome for outcome in outcomes if outcome.job.seed == 0]
    row = make_rows(alone, ["local", "fedavg"])[-1]
    assert row.against_local is not None
    assert row.against_local.half_width is None
    assert "+0.300" in as_text([row], "accuracy")


def test_a_difference_within_the_noise_is_not_clear() -> None:
    runs = [
        *(_outcome("local", s, 0.5, a=0.5) for s in range(3)),
        *(_outcome("fedprox", s, value) for s, value in enumerate((0.4, 0.5, 0.65))),
    ]
    row = make_rows(runs, ["local", "fedprox"])[-1]
    assert row.against_local is not None
    assert row.against_local.mean == pytest.approx(0.05 / 3)
    assert row.against_local.p_value > 0.5
    assert " *" not in as_text([row], "accuracy").splitlines()[-1]


def test_without_classes_the_loss_decides(outcomes: list[FinishedRun]) -> None:
    assert deciding_metric(outcomes) == "accuracy"
    records = [{**record, "eval": {"loss": 1.5}} for record in outcomes[0].records]
    unlabelled = FinishedRun(outcomes[0].job, records, summarise(records, {}))
    assert deciding_metric([*outcomes, unlabelled]) == "loss"


def test_curves_span_the_seeds(outcomes: list[FinishedRun]) -> None:
    _, (number, mean, low, high) = curves(outcomes, "accuracy")["fedavg"]
    assert (number, low, high) == (2, pytest.approx(0.8), pytest.approx(0.84))
    assert mean == pytest.approx(0.82)


def test_tables_agree(outcomes: list[FinishedRun]) -> None:
    rows = make_rows(outcomes, ["local", "fedavg"])
    table = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [line["name"] for line in table] == [row.name.strip() for row in rows]
    assert float(table[-1]["accuracy_mean"]) == pytest.approx(0.82)
    markdown = as_markdown(rows, "accuracy", "note").splitlines()
    assert len(markdown) == len(rows) + 4
    assert len({line.count("|") for line in markdown[: len(rows) + 2]}) == 1
    lines = as_text(rows, "accuracy").splitlines()
    assert "0.820 ± 0.020" in lines[-1]
    assert "*" in lines[-1]


def test_the_report_has_the_numbers_of_the_table(outcomes: list[FinishedRun]) -> None:
    rows, metric = make_rows(outcomes, ["local", "fedavg"]), "accuracy"
    page = comparison_page(
        RunFacts("c", Config(), []), Tabulated(outcomes, rows, metric, "note"), "fedllm compare"
    )
    blocks = {section.title: section.blocks for section in page.sections}
    table, drawn = blocks["Results"]
    assert isinstance(table, Table)
    assert [table.header, *table.rows] == lines_of(rows, metric)
    assert isinstance(drawn, Table)
    assert drawn.rows[-1] == [
        "fedavg",
        Bar("0.820", *(pytest.approx(v) for v in (0.82, 0.8, 0.84))),
    ]
    [differences] = blocks["Paired differences from local"]
    assert isinstance(differences, Table)
    [[name, difference]] = differences.rows
    against = rows[-1].against_local
    assert against is not None
    assert against.half_width is not None
    low, high = against.mean - against.half_width, against.mean + against.half_width
    text = f"{against.mean:+.3f} ± {against.half_width:.3f} *"
    assert (name, difference) == ("fedavg", Bar(text, against.mean, low, high))
    charts = {block.title: block for block in blocks["Curves"] if isinstance(block, Chart)}
    moved = charts["Accuracy against megabytes moved, both ways"]
    assert [(line.name, list(line.x)) for line in moved.series] == [("fedavg", [0.0, 3.0])]
    assert "fedavg with a mean accuracy of 0.820; base 0.250, local (mean) 0.510" in page.headline


def test_every_run_has_the_same_budget(tmp_path: Path) -> None:
    options = ["training.max_steps=3", "federation.num_rounds=5", "compare.seeds=2", "seed=7"]
    jobs = make_jobs(options, None, COMPARED, tmp_path)
    assert [job.seed for job in jobs] == [7] * 9 + [8] * 9
    assert [job.algorithm for job in jobs[:9]] == list(COMPARED)
    steps = {job.algorithm: job.config.training.max_steps for job in jobs}
    assert steps.pop("centralized") == 3 * 4  # four of ten clients a round
    assert set(steps.values()) == {3}
    chosen = {job.algorithm: num_sampled(job.config, 10) for job in jobs}
    del chosen["centralized"]
    assert chosen == {name: 10 if name == "local" else 4 for name in chosen}
    sampled = make_jobs([*options, "algorithm.participation=sampled"], None, ["local"], tmp_path)
    assert num_sampled(sampled[0].config, 10) == 4
    assert {job.config.federation.num_rounds for job in jobs} == {5}
    assert {job.config.federation.engine for job in jobs} == {"inprocess"}
    assert len({job.config.output_dir for job in jobs}) == 18


def test_centralized_holds_all_data_whatever_the_partition(tmp_path: Path) -> None:
    options = ["partition=dirichlet", "federation.num_clients=6", "federation.sample_clients=3"]
    job = make_jobs(options, None, ["centralized"], tmp_path)[0]
    assert job.config.partition.name == "iid"
    assert job.config.federation.num_clients == 1
    assert job.config.training.max_steps == 3 * compose([]).training.max_steps


def test_settings_belong_to_one_algorithm(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    text = "# @package _global_\ncompare:\n  settings: {fedadam: {eta: 0.5}}\n"
    (folder / "own.yaml").write_text(text)
    names = ["fedavg", "fedadam", "fedyogi"]
    jobs = make_jobs(["experiment=own"], str(tmp_path), names, tmp_path)
    eta = {job.algorithm: job.config.algorithm.eta for job in jobs}
    assert eta == {"fedavg": 1.0, "fedadam": 0.5, "fedyogi": 1e-3}
    (folder / "own.yaml").write_text(text.replace("eta", "etta"))
    with pytest.raises(ConfigError, match=r"compare\.settings\.fedadam\.etta.*beta1"):
        make_jobs(["experiment=own"], str(tmp_path), names, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm=fedavgg"], "algorithm=fedavgg: choose all"),
        (["seeds=0"], "compare.seeds must be > 0"),
        (["resume=nowhere"], "resume=nowhere: no compare.json"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        compare(arguments, None)
    assert not list(tmp_path.iterdir())


def test_a_directory_takes_one_comparison(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a comparison already"):
        compare([f"output_dir={tmp_path}"], None)


def test_done_means_that_the_summary_is_there(tmp_path: Path) -> None:
    job = make_jobs(["seed=1"], None, ["fedavg"], tmp_path)[0]
    assert not job.done
    job.directory.path.mkdir(parents=True)
    job.directory.summary.write_text("{}")
    assert job.done
    assert not replace(job, config=replace(job.config, output_dir=str(tmp_path / "x"))).done
