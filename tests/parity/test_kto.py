"""A client's round of KTO against an unmodified trl.KTOTrainer on the same answers.

TRL loads the model by itself, tokenises the text, computes the reference in every step, and pairs
each prompt of a batch with the answer before it for the KL divergence.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

from fedllm_flwr.client.local_round import train_locally
from fedllm_flwr.config import Config
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.federation.messages import Assignment, Update
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.params import Params, add
from fedllm_flwr.tasks.kto.examples import EncodedAnswers
from fedllm_flwr.training.schedule import draw_examples
from toy_answers import random_answers

pytestmark = pytest.mark.usefixtures("one_thread")

LEARNING_RATE = 1e-2
TOLERANCE = 2e-5  # absolute; AdamW moves a weight by up to 1e-2 a step, clipped SGD by 5e-3
BATCH = 8

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def answers() -> EncodedAnswers:
    return random_answers(50)


def settings(kto: dict[str, Any], **training: Any) -> dict[str, Any]:
    """Sections of a configuration: no dropout, and steps that clipping touches."""
    defaults = {"max_steps": 1, "batch_size": BATCH, "max_grad_norm": 0.5}
    return {
        "task": {"name": "kto"},
        "lora": {"dropout": 0.0},
        "training": defaults | training,
        "kto": {"beta": 0.5} | kto,
    }


def adapter(config: Config, seed: int = 5) -> Params:
    """A global adapter whose matrices are all non-zero, as after some rounds."""
    rng = np.random.default_rng(seed)
    shapes = {name: value.shape for name, value in load_model(config).initial.items()}
    return {n: rng.normal(0, 0.1, shape).astype(np.float32) for n, shape in shapes.items()}


def train(config: Config, params: Params, answers: EncodedAnswers, state: Path) -> Update:
    assignment = Assignment(1, params, LEARNING_RATE, config)
    return train_locally(assignment, ClientData("a", answers, answers), state)


def drawn(config: Config, answers: EncodedAnswers) -> list[int]:
    count = config.training.max_steps * config.training.batch_size
    return draw_examples(len(answers), count, 0, config.seed, "a").tolist()


def as_text(answers: EncodedAnswers, order: list[int], tokenizer: Any) -> Dataset:
    """Prompt, completion and label as TRL wants them, in the order of training."""

    def text(tokens: np.ndarray) -> str:
        return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    records = []
    for index in order:
        tokens, answer = answers.rows[index]
        label = bool(answers.desirable[index])
        records.append(
            {"prompt": text(tokens[~answer]), "completion": text(tokens[answer]), "label": label}
        )
    return Dataset.from_list(records)


class PlainTrl:
    """KTOTrainer with a fresh adapter, into which the global one is put."""

    def __init__(self, config: Config, answers: EncodedAnswers, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        training, kto = config.training, config.kto
        self.trainer = KTOTrainer(
            model=AutoModelForCausalLM.from_pretrained(config.model.path),
            args=KTOConfig(
                output_dir=str(folder),
                beta=kto.beta,
                desirable_weight=kto.desirable_weight,
                undesirable_weight=kto.undesirable_weight,
                per_device_train_batch_size=training.batch_size,
                gradient_accumulation_steps=1,
                max_steps=training.max_steps,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                optim={"adamw": "adamw_torch", "sgd": "sgd"}[training.optimizer],
                max_grad_norm=training.max_grad_norm,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            train_dataset=as_text(answers, drawn(config, answers), tokenizer),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=config.lora.r,
                lora_alpha=config.lora.alpha,
                lora_dropout=0.0,
                target_modules=["q_proj", "v_proj"],
                task_type="CAUSAL_LM",
            ),
        )
        self.weights = {
            name.replace(".default", ""): weight
            for name, weight in self.trainer.model.named_parameters()
            if ".default" in name
        }

    def train(self, params: Params) -> Params:
        assert self.weights.keys() == params.keys()
        for name, weight in self.weights.items():
            weight.data = torch.tensor(params[name])
        self.trainer.train()
        return {name: weight.detach().numpy().copy() for name, weight in self.weights.items()}

    def mean(self, name: str) -> float:
        return float(np.mean([log[name] for log in self.trainer.state.log_history if name in log]))


def distance(one: Params, other: Params) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw": ({}, {}),
    # A step of SGD without clipping is the gradient itself.
    "sgd": ({}, {"optimizer": "sgd", "max_grad_norm": 0.0}),
    "weights": ({"desirable_weight": 0.7, "undesirable_weight": 1.6}, {"optimizer": "sgd"}),
    "micro-batches": ({"undesirable_weight": 1.3}, {"micro_batch_size": 2}),
    # AdamW would divide the rounding of small gradients by their size.
    "several steps": ({}, {"max_steps": 3, "optimizer": "sgd", "max_grad_norm": 0.0}),
}


@pytest.mark.parametrize(("kto", "training"), CASES.values(), ids=CASES)
def test_a_round_equals_trl(
    kto: dict[str, Any],
    training: dict[str, Any],
    make_config: MakeConfig,
    answers: EncodedAnswers,
    tmp_path: Path,
) -> None:
    config = make_config(**settings(kto, **training))
    params = adapter(config)
    update = train(config, params, answers, tmp_path / "state")

    plain = PlainTrl(config, answers, tmp_path / "trl")
    expected = plain.train(params)

    assert distance(add(params, update.delta), expected) < TOLERANCE
    assert distance(params, expected) > 20 * TOLERANCE
    assert update.metrics["loss"] == pytest.approx(plain.mean("loss"), abs=1e-4)
    assert update.metrics["kl"] == pytest.approx(plain.mean("kl"), abs=1e-3)
    if config.training.max_steps == 1:  # TRL's means over steps weigh unequal numbers equally
        margin = plain.mean("rewards/margins")
        assert update.metrics["margin"] == pytest.approx(margin, abs=1e-4)


@pytest.mark.parametrize("verdict", [True, False])
def test_one_kind_of_answers_equals_trl(
    verdict: bool, make_config: MakeConfig, answers: EncodedAnswers, tmp_path: Path
) -> None:
    """A client whose answers are all desirable, or all undesirable, trains on these."""
    same = answers.take(np.flatnonzero(answers.desirable == verdict))
    config = make_config(**settings({}, optimizer="sgd"))
    params = adapter(config)
    update = train(config, params, same, tmp_path / "state")
    expected = PlainTrl(config, same, tmp_path / "trl").train(params)
    assert distance(add(params, update.delta), expected) < TOLERANCE
    assert "margin" not in update.metrics


def test_trl_makes_the_same_tokens_of_the_text(
    make_config: MakeConfig, answers: EncodedAnswers, tmp_path: Path
) -> None:
    """Also of the mismatched answers."""
    config = make_config(**settings({}))
    order = drawn(config, answers)
    mixed = answers.mismatched(np.array(order), config.training.max_length)
    trained_on = PlainTrl(config, answers, tmp_path).trainer.train_dataset
    for place, (index, theirs) in enumerate(zip(order, trained_on, strict=True)):
        tokens, answer = answers.rows[index]
        assert theirs["prompt_ids"] == tokens[~answer].tolist()
        assert theirs["completion_ids"] == tokens[answer].tolist()
        tokens, answer = mixed[place]
        assert theirs["prompt_ids"] == tokens[~answer].tolist()
        assert theirs["KL_completion_ids"] == tokens[answer].tolist()
