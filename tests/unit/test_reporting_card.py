"""The model card: front matter and tables parsed back, its code compiled."""

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.schema import DataConfig, PartitionConfig
from fedllm_flwr.data.templates import render
from fedllm_flwr.reporting.card import model_card
from toy_tokenizers import byte_level

SUMMARY: dict[str, Any] = {
    "base": {"loss": 2.8712, "perplexity": 17.66, "accuracy": 0.341},
    "final": {"loss": 0.4314, "perplexity": 1.539, "accuracy": 0.911},
    "rounds": 12,
    "seconds": 58.2,
    "bytes_up": 3_981_312,
    "bytes_down": 3_981_312,
}


def config() -> Config:
    partition = PartitionConfig(name="natural", column="desk")
    return Config(data=DataConfig(path="embedded"), partition=partition)


def front_matter(card: str) -> dict[str, Any]:
    start, block, _ = card.split("---\n", 2)
    assert start == ""
    values: dict[str, Any] = yaml.safe_load(block)
    return values


def table(card: str, heading: str) -> list[list[str]]:
    body = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_front_matter_names_a_base_on_the_hub() -> None:
    values = front_matter(model_card(config(), SUMMARY, "meta-llama/Llama-3.2-1B"))

    assert values["base_model"] == "meta-llama/Llama-3.2-1B"
    assert values["library_name"] == "peft"
    assert {"lora", "federated-learning", "fedavg", "sft"} <= set(values["tags"])


@pytest.mark.parametrize("base", ["embedded", "/data/secret project/base7m", "./base7m"])
def test_a_base_that_is_on_no_hub_is_worded_and_not_linked(base: str) -> None:
    card = model_card(config(), SUMMARY, base)

    assert "base_model" not in front_matter(card)
    assert "huggingface.co" not in card
    assert "secret" not in card
    assert ("base7m" in card) == (base != "embedded")


@pytest.mark.parametrize("base", ["embedded", "meta-llama/Llama-3.2-1B", "/data/base"])
def test_code_compiles_and_finds_the_base(base: str) -> None:
    [code] = re.findall(r"```python\n(.*?)```", model_card(config(), SUMMARY, base), re.DOTALL)
    compile(code, "card", "exec")

    if base == "embedded":
        names: dict[str, Any] = {}
        imports, base_line = (
            code.split("\nimport torch")[0],
            code.split("\nbase = ")[1].split("\n")[0],
        )
        exec(f"{imports}\nbase = {base_line}", names)
        import fedllm_flwr

        assert names["base"] == str(Path(fedllm_flwr.__file__).parent / "assets" / "tiny")


@pytest.mark.parametrize("template", ["alpaca", "vicuna"])
def test_layout_is_that_of_training(template: str) -> None:
    """Prompt, one space, answer and end token are what `render` makes of an exchange."""
    made = changed(config(), data={"template": template})
    card = model_card(made, SUMMARY, "embedded")
    [line] = re.findall(r"^template = (.*)$", card, re.MULTILINE)
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    tokenizer = byte_level(eos="</s>")
    rendered = "".join(part.text for part in render(turns, template, tokenizer))
    assert ast.literal_eval(line).format(instruction="Why?") + " So.</s>" == rendered
    assert "followed by one space" in card


def test_dtype_of_the_run_is_that_of_loading() -> None:
    assert "dtype=torch.bfloat16)" in model_card(config(), SUMMARY, "embedded", "bfloat16")


def test_results_are_those_of_the_summary() -> None:
    rows = table(model_card(config(), SUMMARY, "embedded"), "Results on held-out records")

    assert rows[0] == ["model", "loss (nats/token)", "perplexity", "accuracy"]
    assert rows[2:] == [
        ["base", "2.871", "17.66", "0.341"],
        ["with this adapter", "0.431", "1.54", "0.911"],
    ]


def test_a_run_that_started_from_an_adapter_says_so() -> None:
    made = replace(config(), init_adapter="earlier/adapter")
    rows = table(model_card(made, SUMMARY, "embedded"), "Results on held-out records")

    assert [row[0] for row in rows[2:]] == ["start", "with this adapter"]


def test_a_run_without_evaluation_has_no_results() -> None:
    card = model_card(config(), SUMMARY | {"base": None, "final": None}, "embedded")

    assert "Results" not in card


def test_how_it_was_made() -> None:
    made = changed(
        config(),
        data={"path": "/home/someone/notes|2.jsonl", "name": "jsonl"},
        training={"learning_rate": 0.005, "max_steps": -1, "num_epochs": 2.0},
    )
    card = model_card(made, SUMMARY, "embedded")

    rows = {row[0]: row[1] for row in table(card.replace("\\|", "/"), "How it was made")[2:]}
    assert rows["data"] == "jsonl, a local file (`notes/2.jsonl`)"
    assert rows["clients"] == "natural by `desk`, one per value"
    assert rows["algorithm"] == "fedavg, 12 rounds"
    assert rows["local training"].startswith("2 epochs per round, 16 examples per step, adamw")
    assert "0.005" in rows["local training"]
    assert rows["communication"] == "3.98 MB up, 3.98 MB down, as bfloat16"
    assert "someone" not in card
