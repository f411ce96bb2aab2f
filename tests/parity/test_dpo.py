"""A client's round of DPO against an unmodified trl.DPOTrainer on the same pairs.

TRL loads the model by itself, tokenises the text of the pairs, pads each batch to its longest
row, computes the reference in every step and knows nothing of micro-batches.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from fedllm_flwr.client.local_round import train_locally
from fedllm_flwr.config import Config
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.federation.messages import Assignment, Update
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.params import Params, add
from fedllm_flwr.tasks.dpo.pairs import EncodedPairs
from fedllm_flwr.training.schedule import draw_examples
from toy_pairs import random_pairs

pytestmark = pytest.mark.usefixtures("one_thread")

LEARNING_RATE = 1e-2
TOLERANCE = 2e-5  # absolute; AdamW moves a weight by up to 1e-2 a step, clipped SGD by 5e-3

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def pairs() -> EncodedPairs:
    return random_pairs(50)


def settings(dpo: dict[str, Any], **training: Any) -> dict[str, Any]:
    """Sections of a configuration: no dropout, and steps that clipping touches."""
    defaults = {"max_steps": 4, "batch_size": 8, "max_grad_norm": 0.5}
    return {
        "task": {"name": "dpo"},
        "lora": {"dropout": 0.0},
        "training": defaults | training,
        "dpo": {"beta": 0.5} | dpo,
    }


def start(config: Config, seed: int = 5) -> Params:
    """A global adapter whose matrices are all non-zero, as after some rounds."""
    rng = np.random.default_rng(seed)
    shapes = {name: value.shape for name, value in load_model(config).initial.items()}
    return {n: rng.normal(0, 0.1, shape).astype(np.float32) for n, shape in shapes.items()}


def train(config: Config, params: Params, pairs: EncodedPairs, state: Path) -> Update:
    task = Assignment(1, params, LEARNING_RATE, config)
    return train_locally(task, ClientData("a", pairs, pairs), state)


def as_text(pairs: EncodedPairs, order: list[int], tokenizer: Any) -> Dataset:
    """Prompt, chosen and rejected answer as TRL wants them, in the order of training."""

    def text(tokens: np.ndarray) -> str:
        return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    records = []
    for index in order:
        (chosen, better), (rejected, worse) = pairs[index]
        answers = {"chosen": text(chosen[better]), "rejected": text(rejected[worse])}
        records.append({"prompt": text(chosen[~better]), **answers})
    return Dataset.from_list(records)


def trl_arguments(config: Config, folder: Path, losses: dict[str, float]) -> DPOConfig:
    training = config.training
    return DPOConfig(
        output_dir=str(folder),
        beta=config.dpo.beta,
        loss_type=list(losses),
        loss_weights=list(losses.values()),
        label_smoothing=config.dpo.label_smoothing,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_steps=training.max_steps,
        train_sampling_strategy="sequential",
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
    )


def drawn(config: Config, pairs: EncodedPairs) -> list[int]:
    training = config.training
    per_step = training.batch_size * training.gradient_accumulation_steps
    return draw_examples(len(pairs), training.max_steps * per_step, 0, config.seed, "a").tolist()


class PlainTrl:
    """DPOTrainer with a fresh adapter; the global adapter is put in once the trainer is made."""

    def __init__(
        self,
        config: Config,
        pairs: EncodedPairs,
        folder: Path,
        losses: dict[str, float],
        copied_reference: bool = False,
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(config.model.path)
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        lora = LoraConfig(
            r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=0.0,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        )
        self.trainer = DPOTrainer(
            model=get_peft_model(model, lora) if copied_reference else model,
            args=trl_arguments(config, folder, losses),
            train_dataset=as_text(pairs, drawn(config, pairs), tokenizer),
            processing_class=tokenizer,
            peft_config=None if copied_reference else lora,
        )
        assert ("ref" in self.trainer.model.peft_config) == copied_reference
        self.weights = {
            name.replace(".default", ""): weight
            for name, weight in self.trainer.model.named_parameters()
            if ".default" in name
        }

    def load(self, params: Params) -> None:
        assert self.weights.keys() == params.keys()
        for name, weight in self.weights.items():
            weight.data = torch.tensor(params[name])

    def train(self) -> Params:
        self.trainer.train()
        return {name: weight.detach().numpy().copy() for name, weight in self.weights.items()}

    def mean(self, name: str) -> float:
        return float(np.mean([log[name] for log in self.trainer.state.log_history if name in log]))


def distance(one: Params, other: Params) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


CASES = {
    "sigmoid": ({}, {}, {"sigmoid": 1.0}),
    "sigmoid, sgd": ({}, {"optimizer": "sgd"}, {"sigmoid": 1.0}),
    "sigmoid, accumulated": (
        {},
        {"batch_size": 4, "gradient_accumulation_steps": 2},
        {"sigmoid": 1.0},
    ),
    "ipo": ({"loss_type": "ipo"}, {}, {"ipo": 1.0}),
    "ipo, sgd": ({"loss_type": "ipo"}, {"optimizer": "sgd"}, {"ipo": 1.0}),
    "hinge": ({"loss_type": "hinge"}, {"micro_batch_size": 4}, {"hinge": 1.0}),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.2}, {}, {"robust": 1.0}),
    # The SFT term is a mean over a micro-batch's tokens, so that the whole batch is one here.
    "sigmoid and sft": (
        {"sft_weight": 0.3},
        {"micro_batch_size": 8},
        {"sigmoid": 1.0, "sft": 0.3},
    ),
}


@pytest.mark.parametrize(("dpo", "training", "losses"), CASES.values(), ids=CASES)
def test_a_round_equals_trl(
    dpo: dict[str, Any],
    training: dict[str, Any],
    losses: dict[str, float],
    make_config: MakeConfig,
    pairs: EncodedPairs,
    tmp_path: Path,
) -> None:
    config = make_config(**settings(dpo, **training))
    params = start(config)
    update = train(config, params, pairs, tmp_path / "state")

    plain = PlainTrl(config, pairs, tmp_path / "trl", losses)
    plain.load(params)
    expected = plain.train()

    assert distance(add(params, update.delta), expected) < TOLERANCE
    assert distance(params, expected) > 50 * TOLERANCE
    assert update.metrics["loss"] == pytest.approx(plain.mean("loss"), abs=1e-4)
    assert update.metrics["margin"] == pytest.approx(plain.mean("rewards/margins"), abs=1e-4)
    accuracy = plain.mean("rewards/accuracies")
    assert update.metrics["accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_a_first_round_equals_trl_with_its_own_copy_as_reference(
    make_config: MakeConfig, pairs: EncodedPairs, tmp_path: Path
) -> None:
    """In a first round alone: TRL's reference is the adapter as it is, which is the base there."""
    config = make_config(**settings({}))
    params = load_model(config).initial
    update = train(config, params, pairs, tmp_path / "state")

    plain = PlainTrl(config, pairs, tmp_path / "trl", {"sigmoid": 1.0}, copied_reference=True)
    for name, weight in plain.weights.items():  # A is random, and TRL has copied another
        weight.data = torch.tensor(params[name])
    expected = plain.train()
    assert distance(add(params, update.delta), expected) < TOLERANCE
    assert distance(params, expected) > 50 * TOLERANCE


def test_trl_makes_the_same_tokens_of_the_text(
    make_config: MakeConfig, pairs: EncodedPairs, tmp_path: Path
) -> None:
    config = make_config(**settings({}))
    trained_on = PlainTrl(config, pairs, tmp_path, {"sigmoid": 1.0}).trainer.train_dataset
    for index, theirs in zip(drawn(config, pairs), trained_on, strict=True):
        (chosen, better), (rejected, worse) = pairs[index]
        assert theirs["prompt_ids"] == chosen[~better].tolist() == rejected[~worse].tolist()
        assert theirs["chosen_ids"] == chosen[better].tolist()
        assert theirs["rejected_ids"] == rejected[worse].tolist()
