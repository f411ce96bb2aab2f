"""What an active server sends to a site to read its records; each message goes through `answer`.

The sites are real: a tiny model, records on disk, messages as they come off the wire.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict
from safetensors.torch import load_file

from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.schema import FederationConfig
from fedllm_flwr.messages import Failure, LocalCorrection, Task
from fedllm_flwr.params import Params
from fedllm_flwr.site import Site, answer
from fedllm_flwr.training.model import load_model
from fedllm_flwr.training.tokenizer import EMBEDDED
from fedllm_flwr.wire import pack_task, unpack_failure, unpack_update

NUM_RECORDS = 80
Ask = Callable[[str, RecordDict], RecordDict]


def asking(**changes: object) -> Config:
    """What an honest server would ask of a site, with some keys changed: section__key=value."""
    config = Config(federation=FederationConfig(engine="deployment", num_clients=1))
    config = changed(
        config,
        training={"max_steps": 4, "batch_size": 16, "max_length": 64},
        communication={"dtype": "float32"},
    )
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config = changed(config, **{section: {name: value}})
    return config


def write_records(file: Path, count: int = NUM_RECORDS) -> Path:
    """Records of different lengths, one with a secret in it."""
    rows = [
        {"instruction": f"Question {i}?", "output": "Because. " * (1 + i % 5)} for i in range(count)
    ]
    rows[7]["output"] = "The patient Iphigenie Sauerbrey is ill."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site whose operator has written no policy: the package's own limits hold."""
    node = {
        "client-name": "ward",
        "data-path": str(write_records(tmp_path / "notes.jsonl")),
        "state-dir": str(tmp_path / "state"),
        "device": "cpu",
    }
    return Site(node, run_id=1, node_id=7)


def initial(config: Config) -> Params:
    """The adapter that an honest server starts from."""
    return load_model(replace(config, training=replace(config.training, device="cpu"))).initial


def task(config: Config, server_round: int = 1, **fields: object) -> RecordDict:
    """A task as it comes off the wire."""
    values = {"params": initial(config), "run": "honest", **fields}
    return pack_task(Task(server_round, learning_rate=1e-3, config=config, **values))  # type: ignore[arg-type]


def refused(reply: RecordDict) -> Failure:
    """The site's refusal."""
    failure = unpack_failure(reply)
    assert failure is not None, "the site did what it was asked to"
    return failure


BASE_TENSORS = {  # of the embedded model -> as PEFT names them
    "model.embed_tokens.weight": "base_model.model.model.embed_tokens.weight",
    "model.norm.weight": "base_model.model.model.norm.weight",
    "model.layers.0.self_attn.q_proj.weight": (
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    ),
}


def test_base_weights_are_not_overwritten(site: Site) -> None:
    """A weight of the base model, once overwritten, stayed for every later task of the process."""
    config, weights = asking(), load_file(EMBEDDED / "model.safetensors")
    before = unpack_update(answer("train", task(config), site)).delta
    for original, name in BASE_TENSORS.items():
        value = np.full(tuple(weights[original].shape), 7.0, np.float32)
        foreign = initial(config) | {name: value}
        for where in ("params", "control", "reference"):
            fields: dict[str, object] = {where: foreign}
            if where == "control":
                fields["correction"] = LocalCorrection(control_variates=True)
            failure = refused(answer("train", task(config, **fields), site))
            assert failure.reason == (
                f"{where} does not fit the base model and the LoRA settings: {name!r} is not a "
                "tensor of this adapter."
            )
    after = unpack_update(answer("train", task(config), site)).delta
    assert {n: v.tobytes() for n, v in after.items()} == {n: v.tobytes() for n, v in before.items()}


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e4])
def test_tensors_that_are_no_adapter_are_refused(site: Site, value: float) -> None:
    config = asking(evaluation__clients=True, data__validation_fraction=0.5)
    params = {name: np.full_like(tensor, value) for name, tensor in initial(config).items()}

    for kind in ("train", "evaluate"):
        failure = refused(answer(kind, task(config, params=params), site))
        assert failure.reason.startswith("params does not fit the base model")
