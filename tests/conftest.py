"""Models and configurations that the tests of several folders share."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.schema import ModelConfig
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.flower.runtime import act_as_server
from toys import as_encoded, write_toy_model

prepare_environment()
act_as_server(run_id=1)  # tests make messages


def pytest_runtest_setup() -> None:
    """Garbage collections during a test walk through what the test has made, not through 4,000
    collected tests and the libraries, which takes seconds each time a model is replaced."""
    gc.freeze()


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
        config = changed(config, training={"max_length": 64}, communication={"dtype": "float32"})
        return changed(config, **sections)

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
