"""Models and configurations that the tests of several folders share."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import ModelConfig
from fedllm_flwr.data.encode import Encoded, EncodeReport
from fedllm_flwr.environment import prepare_environment

prepare_environment()

VOCABULARY = 256 + 3  # bytes and three special tokens


def write_toy_model(directory: Path, **sizes: int) -> Path:
    """A random Llama of two layers (22 k parameters) with a byte-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | sizes
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        initializer_range=0.1,  # larger than usual, so that gradients and scores are no noise
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def byte_tokenizer() -> Any:
    """One token per byte, then <s>, </s> and <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "<s>", "</s>", "<pad>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a small random model that any machine can make."""
    return write_toy_model(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def copied(toy_model: Path, tmp_path: Path) -> Path:
    """A copy of the toy model to damage."""
    return Path(shutil.copytree(toy_model, tmp_path / "copy"))


@pytest.fixture
def make_config(toy_model: Path) -> Callable[..., Config]:
    """A configuration of the toy model; sections are given as dicts of what differs."""

    def make(seed: int = 0, **sections: dict[str, Any]) -> Config:
        config = Config(model=ModelConfig(name="toy", path=str(toy_model)), seed=seed)
        config.training.max_length = 64
        config.communication.dtype = "float32"
        for name, changes in sections.items():
            setattr(config, name, replace(getattr(config, name), **changes))
        return config

    return make


@pytest.fixture
def random_examples() -> Callable[..., Encoded]:
    """Examples of random tokens: a prompt and an answer, of lengths spread like real ones."""

    def make(count: int, seed: int = 0, shortest: int = 6, longest: int = 40) -> Encoded:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(shortest, longest + 1, count)
        tokens = rng.integers(0, 256, int(lengths.sum())).astype(np.int32)
        answers = [rng.integers(1, length - 2) for length in lengths]
        supervised = np.concatenate(
            [
                np.arange(length) >= length - answer
                for length, answer in zip(lengths, answers, strict=True)
            ]
        )
        return as_encoded(tokens, supervised, lengths)

    return make


def as_encoded(
    tokens: NDArray[np.int32], supervised: NDArray[np.bool_], lengths: NDArray[np.int64]
) -> Encoded:
    """Flat arrays as examples, one per record."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    count, total = len(lengths), int(lengths.sum())
    report = EncodeReport(count, count, 0, 0, total, int(supervised.sum()))
    return Encoded(tokens, supervised, offsets, np.arange(count), report)
