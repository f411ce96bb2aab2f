"""Merging: the written model computes what base model and adapter compute side by side."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedllm_flwr.commands import main as cli
from fedllm_flwr.commands.merge import LogitDifference, merge
from fedllm_flwr.config import Config
from fedllm_flwr.errors import ConfigError, ModelError
from fedllm_flwr.models.adapted_model import load_beside
from fedllm_flwr.params import Params
from fedllm_flwr.reporting.metrics import summarise
from fedllm_flwr.runs.adapter_files import save_adapter
from fedllm_flwr.runs.kept_adapters import KeptAdapter
from toys import write_toy_model

TARGETS: dict[str, Any] = {
    "attention": ["q_proj", "v_proj"],
    "all-linear": "all-linear",
    "output embedding": ["lm_head"],
    "input embedding": ["embed_tokens"],
    "both embeddings": ["lm_head", "embed_tokens", "q_proj"],
}


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model whose input and output embeddings are one matrix, and one where they are not."""
    folder = tmp_path_factory.mktemp(request.param)
    return write_toy_model(
        folder, hidden_size=64, intermediate_size=64, tie_word_embeddings=request.param == "tied"
    )


def adapted(
    make_config: Callable[..., Config], base: Path, folder: Path, targets: Any, quantization: str
) -> KeptAdapter:
    """An adapter with values that change the logits much, as PEFT's directory."""
    config = make_config(
        model={"path": str(base)},
        lora={"target_modules": targets},
        quantization={"name": quantization},
        training={"dtype": "float32"},
    )
    model = load_beside(config)
    random = np.random.default_rng(0)
    params: Params = {
        name: random.normal(0, 0.2, value.shape).astype(np.float32)
        for name, value in model.initial.items()
    }
    save_adapter(folder, model, params, config, summarise([], {}))
    return KeptAdapter("final", config, folder)


def logits_of(model: Any, *, disabled: bool = False) -> torch.Tensor:
    tokens = torch.arange(250).reshape(2, 125)
    with torch.no_grad():
        if disabled:
            with model.disable_adapter():
                return model(tokens).logits
        return model.eval()(tokens).logits


def quantized(name: str) -> BitsAndBytesConfig | None:
    return {
        "none": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    }[name]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize(
    ("quantization", "onto"),
    [
        ("none", "full"),
        pytest.param("nf4", "full", marks=pytest.mark.slow),
        pytest.param("nf4", "quantized", marks=pytest.mark.slow),
        pytest.param("int8", "quantized", marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_base_and_adapter(
    base: Path,
    targets: str,
    quantization: str,
    onto: str,
    make_config: Callable[..., Config],
    tmp_path: Path,
) -> None:
    """By PEFT and transformers alone; with shared embeddings they differed by more than 20."""
    kept = adapted(make_config, base, tmp_path / "adapter", TARGETS[targets], quantization)
    lines = list(merge(kept, tmp_path / "merged", onto))
    assert f"merged model written to {tmp_path / 'merged'}" in lines[-1]
    given = quantized(quantization) if onto == "quantized" else None
    plain = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=given
    )
    if given is not None:  # int8 rounds activations, too; the merged model has the weights
        plain = plain.dequantize()
    side_by_side = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    expected = logits_of(side_by_side)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    assert (logits_of(side_by_side, disabled=True) - expected).abs().max() > 0.1
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    one = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    was_one = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert one == (was_one and "embedding" not in targets)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_run_is_told_apart(
    quantization: str, base: Path, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    kept = adapted(make_config, base, tmp_path / "adapter", ["q_proj"], quantization)
    first, second, *_ = merge(kept, tmp_path / "full")
    assert f"trained on the base model in {quantization}" in first
    assert "--onto quantized" in first
    assert second.startswith("the loss on both was not compared: ")  # it names no data
    first, *_ = merge(kept, tmp_path / "quantized", "quantized")
    assert f"into the base model's dequantized {quantization} weights" in first
    full, onto = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("full", "quantized")
    )
    assert (logits_of(full) - logits_of(onto)).abs().max() > 1e-3  # else one option is the other


def test_onto_quantized_needs_a_quantized_run(
    base: Path, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    kept = KeptAdapter("final", make_config(model={"path": str(base)}), tmp_path)
    with pytest.raises(ConfigError, match="--onto quantized: the run's base model is not quant"):
        list(merge(kept, tmp_path / "merged", "quantized"))


@pytest.mark.parametrize("base", ["tied"], indirect=True)
def test_a_merge_that_differs_is_refused_and_leaves_nothing(
    base: Path,
    make_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it went before shared embeddings were separated."""
    kept = adapted(make_config, base, tmp_path / "adapter", ["lm_head"], "none")
    monkeypatch.setattr("fedllm_flwr.commands.merge._untie", lambda _: None)
    with pytest.raises(ModelError, match="logits differ from the adapted model's by"):
        list(merge(kept, tmp_path / "merged"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_difference() -> None:
    expected = torch.tensor([3.0, -4.0])
    found = LogitDifference.of(torch.tensor([3.0, -4.5]), expected)
    assert (found.largest, found.scale, found.relative) == (0.5, 4.0, pytest.approx(0.1))
    assert str(found) == "5.0e-01 at most, of logits up to 4.0"
    assert not LogitDifference.of(torch.tensor([np.nan, 0.0]), expected).relative <= 1


def test_command_takes_a_directory_of_peft(
    make_config: Callable[..., Config],
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapted(make_config, toy_model, tmp_path / "mine", ["q_proj"], "none")
    typed = ["merge", str(tmp_path / "mine"), str(tmp_path / "merged")]
    assert cli.main(typed) == 0
    assert "logits of the merged model and of base model plus" in capsys.readouterr().out
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
