"""The snippets of docs/extending.md, run as plug-ins of a short run would be."""

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedllm_flwr import plugins
from fedllm_flwr.config.compose import compose
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.federation.combine import Combiner
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.server.run import run_simulation
from fedllm_flwr.tasks.base import TrainingTask
from tiny_runs import run_tiny, tiny

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
NAMES = {  # group of entry points -> name in a configuration -> name in the page
    "fedllm_flwr.algorithms": {"sign_avg": "SignAvg"},
    "fedllm_flwr.combiners": {"middle_mean": "MiddleMean"},
    "fedllm_flwr.transforms": {"larger_half": "LargerHalf"},
    "fedllm_flwr.preprocessing": {"tickets": "from_tickets"},
    "fedllm_flwr.tasks": {"neftune": "Neftune"},
    "fedllm_flwr.templates": {"plain": "PLAIN"},
}


class Entry(EntryPoint):
    """An entry point whose object is there already."""

    def load(self) -> Any:
        return SNIPPETS[self.value]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def run_snippets() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "extending"}
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


SNIPPETS = run_snippets()


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a package with these entry points were installed."""

    def entries(group: str) -> dict[str, EntryPoint]:
        return {name: Entry(name, value, group) for name, value in NAMES.get(group, {}).items()}

    monkeypatch.setattr(plugins, "_installed", entries)


def adapter(run: RunDirectory) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def test_every_group_of_entry_points_is_in_the_table() -> None:
    registries = [value for value in vars(plugins).values() if isinstance(value, plugins.Registry)]
    groups = {registry.group for registry in registries} | {plugins.CONF_GROUP}
    assert set(re.findall(r"\| `(fedllm_flwr\.\w+)` \|", PAGE.read_text("utf-8"))) == groups
    assert TrainingTask.__module__ == "fedllm_flwr.tasks.base"


def test_algorithm_combiner_transform_and_template_run(tmp_path: Path) -> None:
    all_three = ("communication.dtype=float32", "federation.sample_clients=3")
    plain = run_tiny(tmp_path / "plain", *all_three)
    for number, override in enumerate(
        (
            "algorithm.combiner=middle_mean",
            "communication.transforms=[larger_half]",
            "data.template=plain",
        )
    ):
        run = run_tiny(tmp_path / f"{number}", *all_three, override)
        assert adapter(run) != adapter(plain), override


def test_the_task_trains_with_noise(tmp_path: Path) -> None:
    (tmp_path / "conf/task").mkdir(parents=True)
    (tmp_path / "conf/task/neftune.yaml").write_text("name: neftune\noptions: {alpha: 20.0}\n")
    plain = run_tiny(tmp_path / "plain")
    adapters = []
    for number in range(2):
        output = f"output_dir={tmp_path}/{number}"
        overrides = tiny("federation.engine=inprocess", output, "task=neftune")
        config = compose(overrides, str(tmp_path / "conf"))
        adapters.append(adapter(run_simulation(config, Console(quiet=True), 0.0)))
    assert adapters[0] == adapters[1] != adapter(plain)


def test_the_rule_of_the_page_takes_steps_of_its_size(tmp_path: Path) -> None:
    rule = SNIPPETS["SignAvg"](size=0.5)
    state = SNIPPETS["ServerState"](0, {"w": np.zeros(3, np.float32)})
    moved = rule.step(state, {"delta": {"w": np.array([0.1, -7.0, 0.0])}}, None)
    np.testing.assert_array_equal(moved.params["w"], [0.5, -0.5, 0.0])


def test_the_combiner_does_not_depend_on_the_order() -> None:
    updates = {"a": [1.0, 5.0], "b": [2.0, -9.0], "c": [100.0, 0.5]}
    results = []
    for order in ("abc", "cab"):
        combiner: Combiner = SNIPPETS["MiddleMean"]()
        for client in order:
            combiner.add(client, {"w": np.array(updates[client], np.float32)}, 1.0)
        results.append(combiner.combined()["w"].tolist())
    assert results == [[2.0, 0.5], [2.0, 0.5]]


def test_the_data_set_reads_its_records(tmp_path: Path) -> None:
    [text] = blocks("yaml")
    folder = tmp_path / "conf" / "data"
    folder.mkdir(parents=True)
    (folder / "tickets.yaml").write_text(text)
    assert yaml.safe_load(text)["preprocessing"] == "tickets"
    file = tmp_path / "tickets.jsonl"
    file.write_text("{}")
    config = compose(["data=tickets", f"data.path={file}"], str(folder.parent))
    row = {"subject": "Login", "text": "It fails.", "reply": "Reset it."}
    prepare = plugins.PREPROCESSING.find(config.data.preprocessing)
    columns = config.data.columns
    assert list(prepare([row, {**row, "reply": ""}], columns)) == [
        {"question": "Login\nIt fails.", "answer": "Reset it."},
        None,
    ]


def test_a_name_that_nothing_installed_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"communication\.transforms=halves is unknown; choose"):
        compose(["communication.transforms=[halves]"])
