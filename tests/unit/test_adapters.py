"""Exported adapters: the same run writes the same files."""

import json
from collections.abc import Callable
from pathlib import Path

from fedllm_flwr.config import Config
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.reporting.metrics import summarise
from fedllm_flwr.runs.adapter_files import save_adapter


def test_adapter_config_is_in_order(make_config: Callable[..., Config], tmp_path: Path) -> None:
    """PEFT alone writes the names of its sets in the order of Python's hashes of the process."""
    names = ["v_proj", "up_proj", "q_proj", "o_proj", "k_proj", "gate_proj", "down_proj"]
    config = make_config(lora={"target_modules": names})
    model = load_model(config)
    save_adapter(tmp_path / "adapter", model, model.initial, config, summarise([], {}))

    text = (tmp_path / "adapter/adapter_config.json").read_text()
    settings = json.loads(text)
    assert settings["target_modules"] == sorted(names)
    assert text == json.dumps(settings, indent=2, sort_keys=True) + "\n"
