"""What a run leaves: files, and an adapter that works without this package."""

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm_flwr.commands import main as cli
from fedllm_flwr.config.compose import compose, load_yaml
from fedllm_flwr.data.client_data import divided_data
from fedllm_flwr.models.tokenizer import model_source
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.server.run import run_simulation
from fedllm_flwr.tasks import task_of
from tiny_runs import tiny

PNG = b"\x89PNG\r\n\x1a\n"
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{} \n\n### Response:"
)


@pytest.fixture(scope="module")
def run(whole_run: Callable[..., Path]) -> Path:
    return whole_run("algorithm=fedavg", "tracking.figures=true")


@pytest.fixture(scope="module")
def plain_peft(run: Path) -> tuple[Any, Any]:
    """The adapter on a fresh base model, by transformers and PEFT alone, and its tokenizer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = model_source(load_yaml(run / "config.yaml").model)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run / "adapter")
    return model.eval(), AutoTokenizer.from_pretrained(source)


def test_a_figure_that_cannot_be_drawn_costs_the_figure_alone(tmp_path: Path) -> None:
    """Its file's place is taken by a directory; the run ends well, with its adapter."""
    (tmp_path / "run" / "curves.png").mkdir(parents=True)
    (tmp_path / "run" / "report.html").mkdir()
    output = io.StringIO()
    overrides = ("federation.engine=inprocess", "tracking.figures=true")
    config = compose(tiny(*overrides, "federation.num_rounds=1", f"output_dir={tmp_path / 'run'}"))
    run_simulation(config, Console(stream=output, interactive=False), 0.0)

    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "summary.json").is_file()
    assert (tmp_path / "run" / "clients.png").read_bytes().startswith(PNG)
    assert "warning: no figure of the curves" in output.getvalue()
    assert "warning: no report.html (FederationError: cannot write" in output.getvalue()


def test_files(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "clients.csv",
        "clients.png",
        "curves.png",
        "report.html",
        "checkpoints",
        "adapter",
    }
    for figure in ("curves.png", "clients.png"):
        assert (run / figure).read_bytes().startswith(PNG)
    assert not list(run.rglob(".*"))  # nothing half written
    assert {path.name for path in (run / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "library_name: peft" in (run / "adapter/README.md").read_text()


def _modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_files_have_the_mode_that_the_umask_says(run: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert _modes(run) == {0o666 & ~mask}


def test_summary_follows_from_the_log(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in log] == [0, 1, 2]
    assert summary["base"] == log[0]["eval"]
    assert summary["final"] == log[2]["eval"]
    for scores in (summary["base"], summary["final"]):
        assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
        assert 0 <= scores["macro_f1"] <= 1
        assert scores["accuracy"] * 20 == pytest.approx(round(scores["accuracy"] * 20))
    assert summary["rounds"] == 2
    assert summary["seconds"] > sum(record["seconds"] for record in log)
    assert sum(summary["phases"].values()) == pytest.approx(summary["seconds"])
    # Two clients a round for two rounds; an adapter in bfloat16 each way.
    # Rank 8 in the four square and the three rectangular projections of four layers.
    trainable = 4 * 8 * (4 * (192 + 192) + 3 * (192 + 448))
    assert summary["bytes_up"] == summary["bytes_down"] == 2 * 2 * 2 * trainable


def test_bytes_are_those_of_the_adapter(run: Path) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(run / "adapter/adapter_model.safetensors")
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert log[1]["bytes_up"] == 2 * 2 * sum(value.size for value in tensors.values())


def test_clients_table(run: Path) -> None:
    with (run / "clients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["client"] for row in rows] == ["client-0", "client-1", "client-2"]
    assert sum(int(row["examples"]) for row in rows) == 100


def test_config_is_the_run(run: Path, tmp_path: Path) -> None:
    config = load_yaml(run / "config.yaml")
    assert config.training.max_steps == 2
    assert config.algorithm.name == "fedavg"
    assert config.resume is None


def test_adapter_reproduces_the_logged_loss(run: Path, plain_peft: tuple[Any, Any]) -> None:
    """Token by token, without batches and without this package's templates or model code."""
    model, tokenizer = plain_peft
    config = load_yaml(run / "config.yaml")
    source, _ = divided_data(config, task_of(config).records)
    nll, count = 0.0, 0
    for turns in source.eval["messages"][:]:
        answer = f" {turns[1]['content']}"
        tokens = [
            tokenizer.bos_token_id,
            *_ids(tokenizer, PROMPT.format(turns[0]["content"]) + answer),
        ]
        tokens.append(tokenizer.eos_token_id)
        supervised = len(_ids(tokenizer, answer)) + 1
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        for place in range(len(tokens) - supervised, len(tokens)):
            nll -= logits[place - 1, tokens[place]].item()
            count += 1
    logged = json.loads((run / "summary.json").read_text())["final"]["loss"]
    assert nll / count == pytest.approx(logged, rel=1e-4)


def test_card_reproduces_the_logged_loss(run: Path) -> None:
    """Its code is run as it stands, with the adapter's path filled in; its layout is taken over."""
    card = (run / "adapter/README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/adapter", str(run / "adapter")), names)
    model, tokenizer, template = names["model"], names["tokenizer"], names["template"]
    config = load_yaml(run / "config.yaml")
    source, _ = divided_data(config, task_of(config).records)
    nll, count = 0.0, 0
    for turns in source.eval["messages"][:]:
        prompt = template.format(instruction=turns[0]["content"])
        before = len(tokenizer(prompt).input_ids)
        tokens = tokenizer(f"{prompt} {turns[1]['content']}{tokenizer.eos_token}").input_ids
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        for place in range(before, len(tokens)):
            nll -= logits[place - 1, tokens[place]].item()
            count += 1
    logged = json.loads((run / "summary.json").read_text())["final"]["loss"]
    assert nll / count == pytest.approx(logged, rel=1e-4)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def test_merged_model_is_base_plus_adapter(
    run: Path, plain_peft: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    assert cli.main(["merge", str(run), str(tmp_path / "merged")]) == 0
    assert str(tmp_path / "merged") in capsys.readouterr().out
    assert _modes(tmp_path / "merged") == _modes(run)
    model, tokenizer = plain_peft
    tokens = torch.tensor([_ids(tokenizer, PROMPT.format("Profit at the bank fell."))])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    merged.eval()
    with torch.no_grad():
        expected, found = model(tokens).logits, merged(tokens).logits
        with model.disable_adapter():
            base = model(tokens).logits
    assert (base - expected).abs().max() > 1e-2  # else the next line could not fail
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert cli.main(["merge", str(run), str(tmp_path / "merged")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'merged'} exists")


def test_generate_answers_as_the_models_do(
    run: Path, plain_peft: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = plain_peft
    prompt = "Is this headline negative, neutral or positive?"
    tokens = [tokenizer.bos_token_id, *_ids(tokenizer, PROMPT.format(prompt))]

    def greedy() -> str:
        written: list[int] = []
        for _ in range(6):
            with torch.no_grad():
                token = int(model(torch.tensor([tokens + written])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            written.append(token)
        return tokenizer.decode(written, skip_special_tokens=True).strip()

    assert cli.main(["generate", str(run), prompt, "--max-new-tokens", "6"]) == 0
    shown = capsys.readouterr().out
    with model.disable_adapter():
        assert f"base       {greedy()}\n" in shown
    assert f"federated  {greedy()}\n" in shown


@pytest.mark.slow
def test_merge_of_a_quantized_run_prints_the_loss_on_both_bases(
    whole_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole_run("quantization=nf4")
    final = json.loads((run / "summary.json").read_text())["final"]
    losses = {}
    for onto in ("full", "quantized"):
        output = str(tmp_path / onto)
        assert cli.main(["merge", str(run), output, "--onto", onto]) == 0
        shown = capsys.readouterr().out
        [(trained, merged)] = re.findall(
            r"^loss on held-out records: ([\d.]+) as trained \(nf4\), ([\d.]+) merged$",
            shown,
            re.MULTILINE,
        )
        assert float(trained) == pytest.approx(final["loss"], abs=1e-4)
        losses[onto] = float(merged)
    assert losses["quantized"] == pytest.approx(final["loss"], rel=1e-3)
    assert losses["full"] != losses["quantized"]
