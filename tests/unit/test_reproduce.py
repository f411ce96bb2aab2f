"""The protocol of docs/experiments.md: what is run, and tables from plain numbers alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.commands import main as cli
from fedllm_flwr.commands.reproduce.document import published_table, write_document
from fedllm_flwr.commands.reproduce.methods import (
    RATE,
    SPAN,
    all_methods,
    chosen_methods,
    planned,
    protocols,
    read_protocol,
)
from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.names import conf_dir
from fedllm_flwr.config.schema import value_of
from fedllm_flwr.config.validation import validate
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.evaluation.suites.catalogue import chosen_tasks


def test_every_method_is_searched_alike() -> None:
    """The same trials for all, each within its range, and those of a shorter search first."""
    for method in all_methods().values():
        settings = [method.setting(1e-3, trial) for trial in range(8)]
        rates = [setting[RATE] / method.rate for setting in settings]
        expected = [1e-3 * SPAN ** (2 * u / 16 - 1) for u in (8, 4, 12, 2, 10, 6, 14, 1)]
        assert rates == pytest.approx(expected, rel=0.01)  # three digits
        if method.second is not None:
            values = [setting[method.second] for setting in settings]
            assert all(method.low < value < method.high for value in values)
            assert len(set(values)) == len(values)
        assert len({tuple(setting.items()) for setting in settings}) == 8
    assert {m.second for m in all_methods().values()} == {None, "algorithm.mu", "algorithm.eta"}


@pytest.mark.parametrize("name", protocols())
def test_every_run_of_every_experiment_composes(name: str, tmp_path: Path) -> None:
    protocol = read_protocol(name)
    chosen_tasks(protocol.tasks)
    for entry in protocol.published:
        assert entry["method"] in all_methods()
        assert set(entry["scores"]) <= set(protocol.tasks)
        assert all(0 < value < 1 for value in entry["scores"].values())
        assert entry["source"].startswith("https://")
    budgets = {}
    overrides = [f"experiment={protocol.experiment}"]
    every = ["main", "sgd", "family"]
    few = ["local", "local_equal_steps", "fedprox_sgd", "centralized", "flora"]
    for method in chosen_methods(every if name == "finance" else few):
        run = planned(method, 2, None, overrides, tmp_path)
        validate(run.config)
        for key, value in run.setting.items():
            assert value_of(run.config, key) == value
        training = run.config.training
        assert 0 <= training.min_learning_rate <= training.learning_rate
        assert run.config.algorithm.name in (method.name, method.name.split("_")[0], "fed_sb")
        assert run.config.data.validation_fraction > 0
        budgets[method.name] = run.steps
    at_equal_steps = {n: budget for n, budget in budgets.items() if n != "local"}
    assert len(set(at_equal_steps.values())) == 1
    assert budgets["local"] > budgets["local_equal_steps"]


@pytest.mark.parametrize("name", ["general", "finance", "medical", "code"])
def test_published_settings_take_the_protocol(name: str, tmp_path: Path) -> None:
    """FlowerTune's and OpenFedLLM's settings, with records to choose by."""
    of_seed = {"general": "alpaca_gpt4", "finance": "fingpt", "medical": "medalpaca"}
    found = [[f"experiment=flowertune_{name}"]]
    found += [
        [f"experiment=openfedllm_{data}", "data.validation_fraction=0.05"]
        for key, data in of_seed.items()
        if key == name
    ]
    for overrides in found:
        run = planned(all_methods()["fedprox"], 0, 1, overrides, tmp_path)
        assert (run.config.federation.num_rounds, run.config.training.batch_size) == (200, 16)
        assert run.setting == {RATE: 5e-5, "algorithm.mu": 0.01}
        assert run.config.lora.r == 32


def test_every_science_experiment_is_one_of_an_experiment() -> None:
    files = {file.stem for file in (conf_dir() / "experiment").glob("science_*.yaml")}
    used = {read_protocol(name).experiment for name in protocols()}
    used |= {str(start) for name in protocols() if (start := read_protocol(name).start)}
    variants = {name for name in files if any(name.startswith(f"{one}_") for one in used)}
    assert files == used | variants


def number(model: str, value: float, p: float = 0.5, **more: Any) -> dict[str, Any]:
    versus = None if model == "local" else (value - 0.5, value - 0.6, value - 0.4, "seeds", p)
    return {
        **{"task": "fpb", "metric": "accuracy", "headline": True, "model": model, "value": value},
        **{"low": value - 0.1, "high": value + 0.1, "chance": 0.333, "vs_local": versus},
        **more,
    }


def a_document() -> dict[str, Any]:
    published = {"system": "A", "metric": "accuracy", "source": "https://x", "method": "fedavg"}
    trial = {
        **{"method": "fedavg", "trial": 0, "seed": 0, "setting": {RATE: 0.001}, "steps": 8},
        **{"validation": {"loss": 0.5, "round": 2}, "seconds": 3.0, "megabytes": 1.0},
        "aggregation_error": 0.1,
    }
    return {
        **{"experiment": "finance", "model": "small", "command": "fedllm reproduce finance"},
        **{"date": "2026-01-01", "device": "cpu", "setting": {"clients": 8}, "versions": {}},
        "trials": [trial],
        "runs": [{**trial, "seed": s, "curve": [[0, 1.0], [2, 0.5]]} for s in (0, 1)],
        "test": [
            *(number("local", 0.5), number("fedavg", 0.8, 0.02), number("fedprox", 0.7, 0.04)),
            number("fedavg", 0.25, metric="unparsable", headline=False),
        ],
        "published": [
            {**published, "model": "small", "scores": {"fpb": 0.75, "fiqa": 0.5}},
            {**published, "model": "small", "scores": {"fpb": 0.65}},
            {**published, "model": "small", "scores": {"fpb": 0.95}},
            {**published, "model": "large", "scores": {"fpb": 0.95}},
        ],
    }


def test_tables_follow_from_the_document(tmp_path: Path) -> None:
    document = json.loads(json.dumps(a_document()))
    write_document(document, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| fedavg | 0.800 ± 0.100 | 0.250 ± 0.100 |" in text
    assert "| fedavg | +0.300 ± 0.100 * |" in text  # 0.02 <= 5 % / 2
    assert "| fedprox | +0.200 ± 0.100 * |" in text  # and then 0.04 <= 5 %
    assert (
        "| fedavg | learning_rate 0.001 | 0.5000 ± 0.0000 | 2 | 8 | 1.0 | 0.100 | 3 | 2 |" in text
    )
    verdicts = [row[-1] for row in published_table(document)[1:]]
    assert verdicts == ["met", "not run", "passed", "missed", "other model"]
    document["test"][1] |= {"value": 0.0, "low": 0.0, "high": 0.0, "examples": 60}
    document["published"][1]["scores"]["fpb"] = 0.059  # Clopper and Pearson: 0 of 60, to 0.0596
    rows = published_table(document)[1:]
    assert [row[-1] for row in rows] == ["missed", "not run", "met", "missed", "other model"]
    assert rows[0][-2] == "0.000 [0.000, 0.060]"
    document["test"][1] = number("fedavg", 0.8, 0.02)
    document["test"][1]["vs_local"] = [0.3, 0.2, 0.4, "seeds", 0.03]
    write_document(document, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| fedavg | +0.300 ± 0.100 |" in text
    assert "| fedprox | +0.200 ± 0.100 |" in text
    assert {file.name for file in tmp_path.iterdir()} == {
        "results.md",
        "test.png",
        "validation.png",
    }


def test_a_plan_lists_every_run_and_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--plan", "--seeds", "3", "--trials", "2", "--methods", "fedprox,local,centralized"]
    assert cli.main(["reproduce", "finance", "federation.num_rounds=5", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = {line.split("   ")[0]: line.split()[-1] for line in lines if "trial 2" in line}
    assert steps == {
        "local, trial 2": "400",
        "fedprox, trial 2": "200",
        "centralized, trial 2": "200",
    }
    assert any("fedprox, 2 further seeds" in line and "2 x 200" in line for line in lines)
    assert any(line.startswith("3,200 optimizer steps") and "12 runs" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["financ"], "Did you mean 'finance'?"),
        ([], "name an experiment"),
        (["finance", "--methods", "fedavgg"], "Did you mean 'fedavg'?"),
        (["finance", "--trials", "0"], "--trials must be > 0"),
        (["finance", "--data-root", "nowhere"], "holds the files of none of fpb, fiqa"),
        (["--table", "nowhere.json"], "no results.json of fedllm reproduce"),
        (["dpo"], "data.test_path=<records to test on>"),
    ],
)
def test_what_cannot_work_is_said_first(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_records_apart_from_a_test_are_for_simulations() -> None:
    sites = {"engine": "deployment", "num_clients": 2}
    drop, unused = {"near_duplicates": "drop"}, {"test_path": "x.jsonl"}
    for sections, said in (
        ({"data": drop, "federation": sites}, "for simulations"),
        ({"data": unused}, "no effect"),
    ):
        with pytest.raises(ConfigError, match=said):
            validate(changed(Config(), **sections))
