"""Rows and differences of an evaluation over several seeds and clients."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from fedllm_flwr.commands.evaluate.candidates import BASE, Candidate
from fedllm_flwr.commands.evaluate.comparison import (
    ModelRow,
    ScoreColumn,
    ScoreTable,
    compare_scores,
)
from fedllm_flwr.commands.evaluate.tables import as_csv, as_text
from fedllm_flwr.config import Config
from fedllm_flwr.evaluation.suites.catalogue import Suite, SuiteMetric, SuiteTask
from fedllm_flwr.evaluation.suites.samples import Samples

METRIC = SuiteMetric("acc", column="acc")
TASK = SuiteTask("t", "s", "", "", "", "", "", (METRIC,))
SUITE = Suite("s", "", (TASK,), ())
ACC = ScoreColumn("s", "t", METRIC, headline=True)
# Accuracies of 100 examples, by row, seed and client.
FEDAVG = {0: 0.80, 1: 0.72, 2: 0.82}
LOCAL = {0: (0.5, 0.6), 1: (0.6, 0.5), 2: (0.5, 0.5)}
BASE_ACCURACY = 0.4


def samples(accuracy: float) -> Samples:
    right = round(100 * accuracy)
    each = [{"id": str(i), "acc": float(i < right)} for i in range(100)]
    return Samples(each)


@pytest.fixture(scope="module")
def comparison() -> ScoreTable:
    config = Config()
    found = [(Candidate(BASE, config), BASE_ACCURACY)]
    found += [(Candidate("fedavg", config, seed=seed), value) for seed, value in FEDAVG.items()]
    for seed, values in LOCAL.items():
        for client, value in zip("ab", values, strict=True):
            found.append((Candidate("local", config, seed=seed, client=client), value))
    scored = {item.name: {"t": samples(value)} for item, value in found}
    return compare_scores([item for item, _ in found], scored, [TASK], [SUITE])


def row(comparison: ScoreTable, name: str) -> ModelRow:
    return next(item for item in comparison.rows if item.name == name)


def test_difference_to_local_is_paired_by_seed_and_covers_the_seeds(
    comparison: ScoreTable,
) -> None:
    difference = comparison.difference(row(comparison, "fedavg"), ACC, "local")
    each = [FEDAVG[seed] - np.mean(LOCAL[seed]) for seed in FEDAVG]

    assert difference is not None
    assert difference.value == pytest.approx(np.mean(each))
    assert (difference.num_seeds, difference.over) == (3, "seeds and examples")
    half = difference.interval[1] - difference.value
    of_seeds = 4.302653 * np.std(each, ddof=1) / np.sqrt(3)
    assert half > of_seeds  # and what the examples share between seeds
    assert half < of_seeds + 1.96 * np.sqrt(0.25 / 100) * 2


def test_base_is_compared_with_every_seed(comparison: ScoreTable) -> None:
    difference = comparison.difference(row(comparison, "fedavg"), ACC, BASE)
    assert difference is not None
    assert difference.value == pytest.approx(np.mean(list(FEDAVG.values())) - BASE_ACCURACY)
    assert difference.num_seeds == 3
    assert row(comparison, "local").scores[ACC].num_examples == 100
    assert row(comparison, BASE).scores[ACC].over == "examples"


def test_tables_say_what_intervals_cover(comparison: ScoreTable) -> None:
    lines = {line["model"]: line for line in csv.DictReader(io.StringIO(as_csv(comparison)))}
    assert lines[BASE]["interval_over"] == "examples"
    assert lines["fedavg"]["interval_over"] == "seeds and examples"
    assert lines["fedavg"]["vs_interval_over_local"] == "seeds and examples"
    assert float(lines["fedavg"]["examples"]) == 100


def test_one_seed_gets_another_mark() -> None:
    config = Config()
    two = [Candidate(BASE, config), Candidate("mine", config)]
    scored = {BASE: {"t": samples(0.3)}, "mine": {"t": samples(0.9)}}
    text = as_text(compare_scores(two, scored, [TASK], [SUITE]))
    assert "+0.600 ± " in text
    assert "†" in text
    assert "*" not in text


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_best_client_is_the_lowest_where_less_is_better(higher_is_better: bool) -> None:
    metric = replace(METRIC, higher_is_better=higher_is_better)
    task = replace(TASK, metrics=(metric,))
    a, b = (Candidate("local", Config(), seed=0, client=client) for client in "ab")
    scored = {a.name: {"t": samples(0.2)}, b.name: {"t": samples(0.5)}}
    table = compare_scores([a, b], scored, [task], [replace(SUITE, tasks=(task,))])
    [column] = table.columns
    best, worst = (row(table, f"  {kind} client").scores[column] for kind in ("best", "worst"))
    assert (best.value, worst.value) == ((0.5, 0.2) if higher_is_better else (0.2, 0.5))


def test_the_share_of_unparsable_answers_is_printed() -> None:
    share = SuiteMetric("unparsable", column="unparsable", higher_is_better=False)
    task = replace(TASK, metrics=(METRIC, share))
    suite = Suite("s", "", (task,), ())
    each = [{"id": str(i), "acc": 1.0, "unparsable": float(i < 30)} for i in range(100)]
    one = [Candidate(BASE, Config())]
    text = as_text(compare_scores(one, {BASE: {"t": Samples(each)}}, [task], [suite]))
    _, table = text.split("s, share of unparsable answers\n")
    assert table.splitlines()[-1].startswith(f"{BASE}   0.300 ± ")
