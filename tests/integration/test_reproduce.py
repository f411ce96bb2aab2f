"""A published experiment at demo size through the whole command: search, seeds, test, tables."""

import json
from pathlib import Path

import pytest

from fedllm_flwr.commands import main as cli
from fedllm_flwr.commands.reproduce import command as command_module
from fedllm_flwr.config.compose import compose
from fedllm_flwr.data.sources import DEMO
from tiny_runs import tiny

pytestmark = pytest.mark.slow

METHODS = "local,fedavg,centralized,fedprox_sgd"


def reproduction(tmp_path: Path, *more: str) -> list[str]:
    """The finance experiment on the embedded model and headlines."""
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    lines = (DEMO / "test.jsonl").read_text().splitlines(keepends=True)
    (data / "fpb_test.jsonl").write_text("".join(lines[:12]))
    settings = tiny(
        *("model=tiny", "training=tiny", "lora=tiny", f"data.path={DEMO / 'train.jsonl'}"),
        *("evaluation.every=1", "partition.min_size=1", "data.validation_fraction=0.2"),
    )
    options = ["--methods", METHODS, "--seeds", "2", "--trials", "2", "--task"]
    options += ["fpb,fpb_generation", "--data-root", str(data)]
    return ["reproduce", "finance", *settings, f"output_dir={tmp_path}/out", *options, *more]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_reproduction_is_searched_repeated_tested_once_and_tabulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    command = reproduction(tmp_path)
    assert cli.main(command) == 0
    out = tmp_path / "out"
    found = json.loads((out / "results.json").read_text())
    methods = METHODS.split(",")
    assert [(t["method"], t["trial"]) for t in found["trials"]] == [
        (name, trial) for trial in (0, 1) for name in methods
    ]
    for name in methods:
        trials = [t for t in found["trials"] if t["method"] == name]
        best = min(trials, key=lambda t: t["validation"]["loss"])
        runs = [run for run in found["runs"] if run["method"] == name]
        assert [run["seed"] for run in runs] == [0, 1]
        assert {run["trial"] for run in runs} == {best["trial"]}
        assert runs[0]["validation"] == best["validation"]  # the trial is the run of seed 0
    steps = {run["method"]: run["steps"] for run in found["runs"]}
    assert steps == {"local": 12, "fedavg": 8, "fedprox_sgd": 8, "centralized": 8}
    tested = {(one["model"], one["task"], one["metric"]): one for one in found["test"]}
    assert tested["fedavg", "fpb", "accuracy"]["by_seed"].keys() == {"0", "1"}
    assert tested["base", "fpb", "accuracy"]["by_seed"].keys() == {"-"}
    assert tested["fedavg", "fpb", "macro F1"]["vs_local"][3] == "seeds and examples"
    unparsable = tested["base", "fpb_generation", "unparsable"]["value"]
    printed = capsys.readouterr().out
    assert "fpb_generation, unparsable" in printed
    assert f"{unparsable:.3f}" in printed
    texts = [json.loads(line)["text"] for line in (out / "test_texts.jsonl").open()]
    assert len(texts) == 12

    written = {file: file.stat().st_mtime_ns for file in out.rglob("summary.json")}
    assert len(written) == 3 * len(methods)
    tables = (out / "results.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(command_module, "_tested", interrupt)
        assert cli.main(command) != 0
    assert json.loads((out / "results.json").read_text()) == found  # with its test
    assert cli.main(command) == 0  # what is done is kept
    assert {file: file.stat().st_mtime_ns for file in out.rglob("summary.json")} == written
    (out / "results.md").unlink()
    (out / "test.png").unlink()
    assert cli.main(["reproduce", "--table", str(out / "results.json")]) == 0
    assert (out / "results.md").read_text() == tables
    assert (out / "test.png").is_file()
    assert cli.main([*command, "lora.r=4"]) == 2
    assert "holds another reproduction" in capsys.readouterr().err


def test_preferences_start_from_instruction_tuning_and_are_tested_on_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    settings = tiny(
        *("model=tiny", "data=preferences", f"data.path={DEMO / 'preferences_train.jsonl'}"),
        *("data.columns.messages=null", "data.columns.instruction=prompt"),
        *("data.columns.output=chosen", f"data.test_path={DEMO / 'preferences_test.jsonl'}"),
        *("evaluation.every=1", "data.validation_fraction=0.2", f"output_dir={tmp_path}/out"),
    )
    options = ["--methods", "local,fedavg", "--seeds", "2", "--trials", "1", "--subset", "8"]
    assert cli.main(["reproduce", "dpo", *settings, *options]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {one["model"]: one for one in found["test"] if one["metric"] == "accuracy"}
    assert rows.keys() == {"base", "local", "fedavg"}
    assert rows["fedavg"]["by_seed"].keys() == {"0", "1"}
    assert rows["fedavg"]["vs_local"][3] == "seeds"
    adapter = tmp_path / "out" / "runs" / "start" / "adapter-best"
    config = compose([f"config={tmp_path}/out/runs/fedavg-0-seed1/config.yaml"])
    assert config.init_adapter == config.dpo.reference_adapter == str(adapter)
    assert config.data.near_duplicates == "drop"
