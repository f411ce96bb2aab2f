"""Composition: groups, the three ways in, sweeps, own groups, the presets, the round trip."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import (
    apply_overrides,
    compose,
    expand_sweep,
    from_run_config,
    load_yaml,
    to_yaml,
)
from fedllm_flwr.config.names import group_choices
from fedllm_flwr.config.schema import ColumnsConfig
from fedllm_flwr.data.client_data import divided_data
from fedllm_flwr.tasks import task_of

NEEDED = {
    "model=custom": "model.path=org/model",
    "data=jsonl": "data.path=.",
    "data=preferences": "data.path=.",
}
CHOICES = [f"{group}={choice}" for group, some in group_choices().items() for choice in some]

# What is typed after "output_dir=", and the directory that is meant.
TEXTS = [
    ("my runs/a b", "my runs/a b"),
    ("'my runs'", "my runs"),
    ('"my runs"', "my runs"),
    ("'a,b'", "a,b"),
    ("a=b", "a=b"),
    ("it's", "it's"),
    ("(a)", "(a)"),
    ("a (1)", "a (1)"),
    ("C:\\Users\\me", "C:\\Users\\me"),
    ("C:\\my runs\\", "C:\\my runs\\"),
    ("C:/Users/me", "C:/Users/me"),
    ("~/runs", "~/runs"),
    ("$HOME", "$HOME"),
    ("${seed}", "0"),
    ("\\${seed}", "${seed}"),
    ("Größe ✓", "Größe ✓"),
    ("2020-01-01", "2020-01-01"),
    ("1e3", "1e3"),
    ("007", "007"),
    ("true", "true"),
    ("'null'", "null"),
    (" x", "x"),
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_survives_saving(choice: str, tmp_path: Path) -> None:
    config = compose([choice, *filter(None, [NEEDED.get(choice)])])

    (tmp_path / "config.yaml").write_text(to_yaml(config), "utf-8")

    assert load_yaml(tmp_path) == load_yaml(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(("typed", "meant"), TEXTS)
def test_text_values_arrive_as_typed_and_survive_saving(
    typed: str, meant: str, tmp_path: Path
) -> None:
    config = compose([f"output_dir={typed}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config), "utf-8")

    assert config.output_dir == meant
    assert load_yaml(tmp_path) == config


def test_values_replace_the_defaults_of_groups() -> None:
    config = compose(
        [
            "algorithm=fedprox",
            "algorithm.mu=0.5",
            "lora.target_modules=[q_proj, v_proj]",
            "data.labels=[yes, 'a, b', 3]",
            "data.columns={label: topic}",
            "data.eval_columns.output=answer",
            "training.learning_rate=1",
            "training.micro_batch_size = 4",
            "federation.num_clients=null",
            "data.template=vicuna",
        ]
    )

    assert (config.algorithm.name, config.algorithm.mu) == ("fedprox", 0.5)
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.data.labels == ["yes", "a, b", "3"]
    assert config.data.columns == ColumnsConfig(label="topic")
    assert config.data.eval_columns == ColumnsConfig(output="answer")
    assert config.training.learning_rate == 1.0
    assert isinstance(config.training.learning_rate, float)
    assert config.training.micro_batch_size == 4
    assert config.federation.num_clients is None


def test_groups_choose_what_belongs_to_them_and_the_user_wins() -> None:
    assert compose().partition.column == "desk"
    assert compose().training.max_length == 256
    assert compose(["model=smollm2_135m"]).training.max_length == 512
    assert compose(["data=fingpt"]).partition.name == "iid"
    assert compose(["data=fingpt", "partition=dirichlet"]).partition.column == "output"
    assert compose(["partition=iid"]).partition.name == "iid"
    assert compose(["training=default"]).training.max_length == 512


def test_three_ways_in_give_the_same(tmp_path: Path) -> None:
    overrides = ["algorithm=scaffold", "seed=3", "output_dir=C:\\my runs", "data.labels=[a,b]"]
    text = r"algorithm=scaffold  seed=3 output_dir='C:\my runs' data.labels=[a,b]"
    first = compose(overrides)
    (tmp_path / "config.yaml").write_text(to_yaml(first), "utf-8")

    assert first.algorithm.name == "scaffold"
    assert first.output_dir == "C:\\my runs"
    assert from_run_config({"overrides": text, "config": ""}) == first
    assert from_run_config({"overrides": "", "config": str(tmp_path)}) == first
    assert load_yaml(tmp_path) == first
    assert compose([f"config={tmp_path}"]) == first

    changed = compose([*overrides[:1], "seed=4", *overrides[2:]])
    assert compose([f"config={tmp_path}", "seed=4"]) == changed
    assert from_run_config({"overrides": "seed=4", "config": str(tmp_path)}) == changed
    assert apply_overrides(first, ["seed=4"]) == changed
    assert from_run_config({}) == compose()


def test_quotes_in_a_run_config_keep_blanks_and_commas() -> None:
    config = from_run_config({"overrides": """data.labels="['a b','c, d']" output_dir="x y" """})

    assert config.data.labels == ["a b", "c, d"]
    assert config.output_dir == "x y"


def test_sweep_is_the_product_in_the_order_typed() -> None:
    runs = expand_sweep(
        ["algorithm=fedavg,fedprox", "seed=range(1,4)", "output_dir=my runs", "data.labels=[a,b]"]
    )

    rest = ["output_dir=my runs", "data.labels=[a,b]"]
    assert runs == [
        [f"algorithm={name}", f"seed={seed}", *rest]
        for name in ("fedavg", "fedprox")
        for seed in (1, 2, 3)
    ]
    assert compose(runs[-1]).seed == 3


def test_sweeps_take_lists_quoted_text_and_patterns() -> None:
    modules = expand_sweep(["lora.target_modules=[q_proj],[q_proj,v_proj]"])
    folders = expand_sweep(["output_dir='a,b',c"])
    algorithms = expand_sweep(["algorithm=glob(fed*)"])

    assert [compose(run).lora.target_modules for run in modules] == [
        ["q_proj"],
        ["q_proj", "v_proj"],
    ]
    assert [compose(run).output_dir for run in folders] == ["a,b", "c"]
    assert ["algorithm=fedprox"] in algorithms
    assert ["algorithm=local"] not in algorithms
    assert expand_sweep([]) == [[]]


def test_own_groups_add_choices(tmp_path: Path) -> None:
    folder = tmp_path / "my conf, (1)"
    (folder / "data").mkdir(parents=True)
    (folder / "experiment").mkdir()
    (folder / "data" / "mine.yaml").write_text("name: mine\nhub_id: org/mine\nsplit: all\n")
    (folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /data: mine\n"
        "  - override /algorithm: fedprox\nalgorithm: {mu: 1e-3}\n"
    )

    config = compose(["experiment=mine", "seed=2"], config_dir=str(folder))

    assert (config.data.name, config.data.hub_id, config.data.split) == ("mine", "org/mine", "all")
    assert (config.algorithm.name, config.algorithm.mu, config.seed) == ("fedprox", 1e-3, 2)
    assert compose(["data=mine"], config_dir=str(folder)).data.hub_id == "org/mine"


PUBLISHED = {
    "openfedllm": "vicgalle/alpaca-gpt4",
    "openfedllm_alpaca_gpt4": "vicgalle/alpaca-gpt4",
    "openfedllm_fingpt": "FinGPT/fingpt-sentiment-train",
    "openfedllm_medalpaca": "medalpaca/medical_meadow_medical_flashcards",
    "openfedllm_codealpaca": "sahil2801/CodeAlpaca-20k",
    "openfedllm_mathinstruct": "TIGER-Lab/MathInstruct",
    "openfedllm_alpaca": "tatsu-lab/alpaca",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_hold_the_published_setting(name: str) -> None:
    config = compose([f"experiment={name}"])

    assert config.data.hub_id == PUBLISHED[name]
    assert config.model.path == "meta-llama/Llama-2-7b-hf"
    assert (config.quantization.name, config.partition.name) == ("int8", "iid")
    assert (config.data.template, config.data.max_samples) == ("alpaca", 20000)
    assert (config.lora.r, config.lora.alpha) == (32, 64)
    federation, training = config.federation, config.training
    assert (federation.num_clients, federation.sample_clients) == (20, 2)
    assert (federation.num_rounds, training.max_steps) == (200, 10)
    assert (training.batch_size, training.max_length) == (16, 512)
    assert (training.learning_rate, training.min_learning_rate) == (5e-5, 1e-6)
    assert (config.algorithm.variant, config.seed) == ("openfedllm", 2023)
    assert config.data.validation_fraction == 0


@pytest.mark.parametrize(
    ("name", "hub_id", "split"),
    [
        ("openfedllm_dpo", "Anthropic/hh-rlhf", "train"),
        ("openfedllm_ultrafeedback", "HuggingFaceH4/ultrafeedback_binarized", "train_sft"),
    ],
)
def test_dpo_presets_hold_the_published_setting(name: str, hub_id: str, split: str) -> None:
    """training_scripts/run_dpo.sh, main_dpo.py, config.py and utils/process_dataset.py."""
    config = compose([f"experiment={name}"])

    assert (config.task.name, config.data.hub_id, config.data.split) == ("dpo", hub_id, split)
    assert config.model.path == "ehartford/Wizard-Vicuna-7B-Uncensored"
    assert (config.quantization.name, config.partition.name) == ("int8", "iid")
    assert (config.data.template, config.data.max_samples) == ("vicuna", 20000)
    assert (config.lora.r, config.lora.alpha, config.dpo.beta) == (8, 16, 0.1)
    federation, training = config.federation, config.training
    assert (federation.num_clients, federation.sample_clients) == (5, 2)
    assert (federation.num_rounds, training.max_steps) == (200, 10)
    assert (training.batch_size, training.max_length) == (16, 512)
    assert (training.learning_rate, training.min_learning_rate) == (5e-4, 1e-5)
    assert (config.algorithm.variant, config.seed) == ("openfedllm", 2023)
    assert config.data.validation_fraction == 0


def test_published_records_all_go_to_the_clients(tmp_path: Path) -> None:
    rows = [{"instruction": f"say {i}", "input": "", "output": f"{i}"} for i in range(200)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    options = ["experiment=openfedllm_alpaca_gpt4", f"data.path={tmp_path / 'train.json'}"]

    config = compose(options)
    source, clients = divided_data(config, task_of(config).records)

    assert [len(indices) for indices in clients.indices] == [10] * 20
    assert len(source.eval) == 0


def test_presets_take_other_algorithms_and_models() -> None:
    config = compose(["experiment=openfedllm_fingpt", "algorithm=fedprox", "model=tiny", "seed=1"])

    assert (config.algorithm.name, config.algorithm.variant) == ("fedprox", "openfedllm")
    assert config.algorithm.mu == 0.01
    assert (config.model.path, config.seed) == ("embedded", 1)


def test_schema_and_yaml_defaults_agree() -> None:
    """Sections that no group sets come from the schema unchanged."""
    composed, plain = compose(), Config()

    for section in ("dpo", "checkpoint", "evaluation", "tracking"):
        assert getattr(composed, section) == getattr(plain, section)


def test_import_and_composition_are_cheap() -> None:
    script = (
        "import time; start = time.process_time()\n"
        "from fedllm_flwr.config.compose import compose\n"
        "compose(['model=llama2_7b', 'seed=3'])\n"
        "seconds = time.process_time() - start\n"
        "import sys; print(seconds, *sys.modules)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]

    heavy = {"torch", "transformers", "flwr", "numpy", "datasets", "ray"}
    assert not heavy.intersection(runs[0])
    assert min(float(run[0]) for run in runs) < 1.0  # seconds of CPU; 0.25 on an idle core
