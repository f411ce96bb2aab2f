"""Export of adapters for PEFT, and loading of adapters to start from."""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedllm_flwr.config import Config
from fedllm_flwr.errors import FederationError, ModelError
from fedllm_flwr.factors import padded, rank_of
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.params import Params, check_like
from fedllm_flwr.reporting.card import model_card
from fedllm_flwr.runs.directory import SCORE_FILE
from fedllm_flwr.runs.kept_adapters import KeptAdapter

_OLD = "old"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_SETTINGS = {"r": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"}


def save_adapter(
    path: Path, model: AdaptedModel, params: Params, config: Config, summary: Mapping[str, Any]
) -> None:
    """Write `params` as a directory for ``PeftModel.from_pretrained``, with a model card.

    The directory atomically replaces an older one.

    Raises:
        FederationError: it cannot be written.
    """
    with _replacing(path) as fresh:
        _export(fresh, model, params, config, summary)


def save_best(
    path: Path,
    model: AdaptedModel,
    adapters: Params | Mapping[str, Params],
    config: Config,
    summary: Mapping[str, Any],
) -> None:
    """Write the adapter of the best round so far, with the round and its scores.

    Args:
        adapters: the tensors, or for local baselines the tensors by client, one folder each.
        summary: summary up to that round; its ``best`` is written to ``score.json``.

    Raises:
        FederationError: it cannot be written; an older one is kept.
    """
    several = {key: value for key, value in adapters.items() if isinstance(value, dict)}
    with _replacing(path) as fresh:
        for name, params in several.items():
            _export(fresh / name, model, params, config, summary)
        if not several:
            _export(fresh, model, {**adapters}, config, summary)  # type: ignore[dict-item]
        (fresh / SCORE_FILE).write_text(json.dumps(summary["best"]) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """An empty folder that atomically replaces `path` when the block ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            fresh = Path(folder) / path.name
            fresh.mkdir()
            yield fresh
            if path.exists():
                path.replace(Path(folder) / _OLD)
            fresh.replace(path)
    except (OSError, SafetensorError) as error:
        raise FederationError(f"cannot write {path}: {error}.") from error


def _write_settings(file: Path, **changes: float) -> None:
    """Sort the lists of names, which PEFT writes in Python's random set order."""
    settings = json.loads(file.read_text(encoding="utf-8")) | changes
    named = ("target_modules", "exclude_modules", "modules_to_save")
    settings |= {key: sorted(settings[key]) for key in named if isinstance(settings.get(key), list)}
    file.write_text(f"{json.dumps(settings, indent=2, sort_keys=True)}\n", encoding="utf-8")


def recover(path: Path) -> None:
    """Restore `path` after a process was killed between the two renames of a replacement."""
    for folder in path.parent.glob(f".{path.name}.*"):
        if not path.exists() and (folder / _OLD).is_dir():
            (folder / _OLD).replace(path)
        shutil.rmtree(folder, ignore_errors=True)


def _export(
    fresh: Path, model: AdaptedModel, params: Params, config: Config, summary: Mapping[str, Any]
) -> None:
    model.load(params)
    model.peft.save_pretrained(
        str(fresh), save_embedding_layers=False, selected_adapters=["default"]
    )
    if (rank := rank_of(params)) > (own := rank_of(model.initial)):
        whole = {name: value.astype(np.float32) for name, value in params.items()}
        save_file(whole, fresh / _WEIGHTS)
        alpha = model.peft.peft_config["default"].lora_alpha * rank / own
        _write_settings(fresh / _CONFIG, r=rank, lora_alpha=alpha)
    else:
        _write_settings(fresh / _CONFIG)
    dtype = str(model.dtype).removeprefix("torch.")
    card = model_card(config, summary, config.model.path, dtype)
    (fresh / "README.md").write_text(card, encoding="utf-8")
    give_usual_mode(fresh, like="README.md")


def give_usual_mode(folder: Path, like: str) -> None:
    """Give all files the read permissions of `like`; safetensors creates private files."""
    for file in folder.iterdir():
        shutil.copymode(folder / like, file)


def load_adapter(path: Path, model: AdaptedModel, any_rank: bool = False) -> Params:
    """The tensors of an exported adapter, for the same base model and LoRA settings.

    Args:
        any_rank: accept a larger rank with the same scale, as of a run with frozen factors.

    Raises:
        ModelError: it is missing, broken, of another shape, or was trained with another scale;
            names the key, this run's value and the adapter's.
    """
    try:
        saved = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no readable adapter_config.json ({error}).") from error
    own = model.peft.peft_config["default"]
    rank, scale = saved.get("r", 0), own.lora_alpha / own.r
    is_larger = any_rank and rank > own.r and math.isclose(saved["lora_alpha"] / rank, scale)
    for key, name in () if is_larger else _SETTINGS.items():
        if name in saved and saved[name] != getattr(own, name):
            raise ModelError(
                f"lora.{key}={getattr(own, name)}, but the adapter in {path} was made with "
                f"lora.{key}={saved[name]}; use that."
            )
    file = path / _WEIGHTS
    try:
        params: Params = load_file(file)
        check_like(params, padded(model.initial, rank_of(params)) if any_rank else model.initial)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: no readable adapter ({error}).") from error
    except FederationError as error:
        raise ModelError(
            f"the adapter in {path} does not fit the base model and the LoRA settings: {error}; "
            "use the model, lora.r and lora.target_modules that it was made with."
        ) from error
    return {name: value.astype("float32") for name, value in params.items()}


def load_kept(kept: KeptAdapter, model: AdaptedModel) -> Params:
    """The tensors of a kept adapter, checked against `model`.

    Raises:
        ModelError: it is broken, or of another shape.
    """
    tensors = kept.tensors()
    if tensors is None:
        return load_adapter(kept.path, model, any_rank=True)
    try:
        check_like(tensors, padded(model.initial, rank_of(tensors)))
    except FederationError as error:
        raise ModelError(f"{kept.path} does not fit the base model: {error}.") from error
    return tensors
