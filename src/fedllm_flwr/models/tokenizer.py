"""Tokenizers of base models, and the location of a base model's files."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from fedllm_flwr.config.schema import ModelConfig
from fedllm_flwr.errors import ModelError

NEEDED = {
    "weights": "config.json and weights as *.safetensors (not pytorch_model.bin)",
    "tokenizer": "tokenizer.json",
}
EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny"


def model_source(model: ModelConfig) -> str:
    """Directory or hub id of the base model.

    Raises:
        ModelError: a local directory does not exist, or contains no model.
    """
    if model.path == "embedded":
        return str(EMBEDDED)
    path = Path(model.path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"model.path={model.path}: no config.json in this directory; give the directory "
                "of a Hugging Face causal language model."
            )
        return str(path)
    if path.exists() or path.is_absolute() or model.path.count("/") != 1:
        raise ModelError(
            f"model.path={model.path}: no such directory, and no hub id (owner/name) either."
        )
    return model.path


@lru_cache(maxsize=4)
def _load(source: str, revision: str | None, special_tokens_as_text: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    tokenizer.special_tokens_as_text = special_tokens_as_text  # read by data.special
    return tokenizer


def load_tokenizer(model: ModelConfig) -> Any:
    """The model's fast tokenizer, loaded once per process.

    Raises:
        ModelError: it is missing or cannot be read.
    """
    source = model_source(model)
    try:
        return _load(source, model.revision, model.special_tokens_as_text)
    except Exception as error:  # transformers raises many kinds; all mean that it is unusable
        raise unusable_model(model, "tokenizer", error) from error


def unusable_model(model: ModelConfig, part: str, error: Exception) -> ModelError:
    """The error for a part of a model that could not be loaded, with the remedy."""
    text = str(error)
    is_hub = not Path(model_source(model)).is_dir()
    if is_hub and ("couldn't connect" in text.lower() or "offline" in text.lower()):
        missing = f"model {model.path} is not on this machine and the hub cannot be reached"
        return ModelError(
            f"{missing}. Give a local copy: model.path=/path/to/dir, or download it on a "
            "connected machine.",
            missing,
        )
    if is_hub and ("gated" in text.lower() or "401" in text or "403" in text):
        gated = f"model {model.path} needs an accepted licence"
        return ModelError(
            f"{gated}: accept it on the model's page, then log in with `hf auth login`; or give a "
            "local copy: model.path=/path/to/dir.",
            gated,
        )
    if is_hub:
        whose, remedy = (
            f"model {model.path}",
            "check the name on the hub, or give a local copy: model.path=/path/to/dir.",
        )
    else:
        whose = "its own copy of the model"
        remedy = f"give the directory of a Hugging Face causal language model with {NEEDED[part]}."
    reason = text.strip().splitlines()[0].rstrip(". ") if text.strip() else type(error).__name__
    return ModelError(
        f"model.path={model.path}: its {part} cannot be loaded ({reason}); {remedy}",
        f"the {part} of {whose} cannot be loaded",
    )
