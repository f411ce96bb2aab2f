"""Models, adapters and targets that cannot be used: one line with key, value and remedy each."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import import_utils

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import ModelConfig
from fedllm_flwr.errors import ConfigError, FedLLMError, ModelError
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.models.device import can_pack, resolve_attention

MakeConfig = Callable[..., Config]


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def other_sizes(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"hidden_size": 64}))


@pytest.mark.parametrize(
    ("damage", "part", "words"),
    [
        (remove("config.json"), "no config.json", "directory of a Hugging Face"),
        (remove("model.safetensors"), "weights cannot be loaded", "*.safetensors"),
        (as_pickle, "weights cannot be loaded", "not pytorch_model.bin"),
        (cut_weights, "weights cannot be loaded", "*.safetensors"),
        (lose_a_tensor, "'model.layers.1.mlp.up_proj.weight' is missing", "again"),
        (other_sizes, "has another shape (21 tensors", "again"),
        (write("config.json", "{"), "not a valid JSON", "config.json"),
        (write("config.json", '{"model_type": "t5"}'), "T5Config", "causal"),
        (write("tokenizer.json", "{}"), "tokenizer cannot be loaded", "tokenizer.json"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_unusable_directories(
    damage: Callable[[Path], None],
    part: str,
    words: str,
    copied: Path,
    make_config: MakeConfig,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(copied)
    with pytest.raises(ModelError) as raised:
        load_model(make_config(model={"path": str(copied)}))
    assert_helpful(raised.value, f"model.path={copied}", part, words)
    assert capfd.readouterr() == ("", "")


def assert_helpful(error: FedLLMError, *parts: str) -> None:
    text = str(error)
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize("path", ["/nowhere/model", "some/deep/path", "model", "./owner/name"])
def test_no_directory_and_no_hub_id(path: str) -> None:
    with pytest.raises(ModelError) as raised:
        load_model(Config(model=ModelConfig(path=path)))
    assert_helpful(raised.value, f"model.path={path}", "no such directory")


@pytest.mark.parametrize("targets", [["nosuch"], ["q_proj", "nosuch"], ["input_layernorm"]])
def test_unmatched_targets(targets: list[str], make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError) as raised:
        load_model(make_config(lora={"target_modules": targets}))
    assert_helpful(raised.value, "lora.target_modules", targets[-1], "all-linear")
    assert load_model(make_config()).initial  # and the next model is whole


def test_foreign_adapters(make_config: MakeConfig) -> None:
    model = load_model(make_config())
    name, value = next(iter(model.initial.items()))
    rest = {n: v for n, v in model.initial.items() if n != name}
    for params, words in (
        (rest, "is missing"),
        (
            model.initial | {"base_model.other.lora_A.weight": value},
            "is not a tensor of this adapter",
        ),
        (rest | {name: value[:1]}, "has shape (1, 32), expected (8, 32)"),
        (rest | {name: value * np.nan}, "holds NaN"),
        (model.initial | {"base_model.model.model.norm.weight": value[0]}, "not a tensor"),
    ):
        with pytest.raises(ModelError) as raised:
            model.load(params)
        assert_helpful(raised.value, words, "does not fit")


@pytest.mark.parametrize("key", ["attention=flash_attention_3", "kernels=liger"])
def test_what_needs_a_gpu(key: str, make_config: MakeConfig) -> None:
    name, value = key.split("=")
    config = make_config(model={name: value}, training={"device": "cpu"})
    with pytest.raises(
        ConfigError, match=rf"model\.{key} needs a CUDA device .*use model\.{name}="
    ):
        load_model(config)


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "chosen"),
    [
        ({2, 3, 4}, 9, torch.bfloat16, "flash_attention_4"),
        ({2, 4}, 8, torch.bfloat16, "flash_attention_2"),
        ({2}, 7, torch.float16, "sdpa"),
        ({2, 4}, 9, torch.float32, "sdpa"),
        (set(), 9, torch.bfloat16, "sdpa"),
    ],
)
def test_attention_is_the_newest_that_runs(
    installed: set[int],
    capability: int,
    dtype: torch.dtype,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    for version in (2, 3, 4):
        there = version in installed
        monkeypatch.setattr(
            import_utils, f"is_flash_attn_{version}_available", lambda there=there: there
        )
    assert resolve_attention("auto", torch.device("cuda"), dtype) == chosen
    assert can_pack(chosen) == (chosen != "sdpa")
    if 4 not in installed or capability < 9:
        with pytest.raises(ConfigError, match=r"capability 9\.0"):
            resolve_attention("flash_attention_4", torch.device("cuda"), dtype)
