"""A client's round against plain PyTorch loops that share no code with the package's training.

The loops load the model by themselves, pad every batch to its longest example, compute all logits
and know nothing of micro-batches. Tolerances are those of float32 sums in another order.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

from fedllm_flwr.client.local_round import train_locally
from fedllm_flwr.config import Config, changed
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.federation.messages import Acknowledged, Assignment, Update
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.params import Params, derive_seed
from fedllm_flwr.tasks.sft import training
from fedllm_flwr.training.schedule import draw_examples

pytestmark = pytest.mark.usefixtures("one_thread")

LEARNING_RATE = 1e-2
TOLERANCE = 2e-5  # absolute; AdamW moves a weight by up to 1e-2 a step, clipped SGD by 1e-3

MakeConfig = Callable[..., Config]
MakeExamples = Callable[..., Encoded]


@dataclass
class PlainClient:
    """LoRA training of one client as a textbook has it."""

    config: Config
    examples: Encoded
    params: Params
    mu: float = 0.0
    drift: Params = field(default_factory=dict)  # c - c_i
    gradients: list[Params] = field(default_factory=list)  # clipped, uncorrected
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.config.model.path)
        lora = self.config.lora
        self.model = get_peft_model(
            model,
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=["q_proj", "v_proj"],
                task_type="CAUSAL_LM",
            ),
        )
        self.weights = {
            name.replace(".default", ""): weight
            for name, weight in self.model.named_parameters()
            if weight.requires_grad
        }
        assert self.weights.keys() == self.params.keys()
        for name, weight in self.weights.items():
            weight.data = torch.tensor(self.params[name])

    def step_loss(self, batch: list[int], size: int | None = None) -> torch.Tensor:
        """Mean negative log-likelihood of the batch's answers, summed in parts of `size`."""
        size = size or len(batch)
        parts = [self._sums(batch[i : i + size]) for i in range(0, len(batch), size)]
        return sum(part[0] for part in parts) / sum(part[1] for part in parts)

    def _sums(self, batch: list[int]) -> tuple[torch.Tensor, int]:
        examples = [self.examples[i] for i in batch]
        longest = max(len(tokens) for tokens, _ in examples)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        real = torch.zeros_like(ids)
        answer = torch.zeros(len(batch), longest, dtype=torch.bool)
        for row, (tokens, supervised) in enumerate(examples):
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            real[row, : len(tokens)] = 1
            answer[row, : len(tokens)] = torch.from_numpy(supervised.copy())
        logits = self.model(input_ids=ids, attention_mask=real).logits
        log_probs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return -(log_probs * answer[:, 1:]).sum(), int(answer[:, 1:].sum())

    def train(self, batches: list[list[int]], size: int | None = None) -> Params:
        """w_i - w after one optimizer step per batch."""
        training = self.config.training
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[training.optimizer]
        optimizer = kind(self.weights.values(), lr=LEARNING_RATE, weight_decay=0.0)
        self.model.train()
        for batch in batches:
            optimizer.zero_grad()
            loss = self.step_loss(batch, size)
            loss.backward()
            self.losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(self.weights.values(), training.max_grad_norm)
            self.gradients.append({n: w.grad.numpy().copy() for n, w in self.weights.items()})
            if self.mu:
                self._add_proximal_gradient()
            for name, term in self.drift.items():
                self.weights[name].grad += torch.from_numpy(term)
            optimizer.step()
        return {n: w.detach().numpy() - self.params[n] for n, w in self.weights.items()}

    def _add_proximal_gradient(self) -> None:
        """Add the gradient of mu/2 ||w_i - w||^2, by autograd."""
        square = sum(
            ((weight - torch.tensor(self.params[name])) ** 2).sum()
            for name, weight in self.weights.items()
        )
        (self.mu / 2 * square).backward()

    def mean_gradient(self) -> Params:
        return {
            name: np.mean([gradient[name] for gradient in self.gradients], axis=0)
            for name in self.params
        }


def drawn(config: Config, examples: Encoded, server_round: int = 1) -> list[list[int]]:
    """The examples of each optimizer step of client `a`."""
    training = config.training
    per_step = training.batch_size * training.gradient_accumulation_steps
    count = training.max_steps * per_step
    indices = draw_examples(len(examples), count, server_round - 1, config.seed, "a")
    return indices.reshape(training.max_steps, per_step).tolist()


def start(config: Config, seed: int = 5) -> Params:
    """A global adapter whose matrices are all non-zero, as after some rounds."""
    rng = np.random.default_rng(seed)
    shapes = {name: value.shape for name, value in load_model(config).initial.items()}
    return {n: rng.normal(0, 0.1, shape).astype(np.float32) for n, shape in shapes.items()}


def task(
    config: Config,
    params: Params,
    server_round: int = 1,
    sent: dict[str, Params] | None = None,
    **algorithm: Any,
) -> Assignment:
    """A task of a client whose updates of all earlier rounds were accepted."""
    before = Acknowledged(server_round - 1, server_round - 1)
    config = changed(config, algorithm=algorithm)
    return Assignment(server_round, params, LEARNING_RATE, config, sent or {}, "", before)


def run(asked: Assignment, examples: Encoded, state: Path) -> Update:
    return train_locally(asked, ClientData("a", examples, examples), state)


def assert_near(actual: Params, expected: Params, tolerance: float = TOLERANCE) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=tolerance, err_msg=name)


def settings(**training: Any) -> dict[str, Any]:
    """Sections of a configuration: no dropout, and steps that clipping touches."""
    defaults = {"max_steps": 4, "batch_size": 8, "max_grad_norm": 0.5}
    return {"lora": {"dropout": 0.0}, "training": defaults | training}


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"optimizer": "sgd"},
        {"batch_size": 4, "gradient_accumulation_steps": 2},
        {"micro_batch_size": 1},
        {"micro_batch_size": 8},
        {"packing": True},
        {"gradient_checkpointing": True},
    ],
    ids=lambda training: ",".join(f"{k}={v}" for k, v in training.items()) or "defaults",
)
def test_a_round_equals_a_plain_loop(
    training: dict[str, Any], make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    config, examples = make_config(**settings(**training)), random_examples(50)
    params = start(config)

    update = run(task(config, params), examples, tmp_path)
    plain = PlainClient(config, examples, params)
    expected = plain.train(drawn(config, examples))

    assert_near(update.delta, expected)
    assert max(float(np.abs(value).max()) for value in expected.values()) > 50 * TOLERANCE
    assert update.metrics["loss"] == pytest.approx(np.mean(plain.losses), abs=1e-5)
    assert update.num_examples == 32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_padded(
    attention: str, make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    sections = settings() | {"model": {"attention": attention}}
    padded, packed = make_config(**sections), make_config(**sections)
    packed = changed(packed, training={"packing": True})
    examples, params = random_examples(50), start(padded)

    one = run(task(padded, params), examples, tmp_path)
    other = run(task(packed, params), examples, tmp_path)
    assert_near(other.delta, one.delta)
    assert other.metrics["computed_tokens"] == other.metrics["tokens"] == one.metrics["tokens"]
    assert one.metrics["computed_tokens"] > one.metrics["tokens"]


@pytest.mark.parametrize("fitting", [1, 0])
def test_a_round_without_memory_is_tried_with_smaller_micro_batches(
    fitting: int,
    make_config: MakeConfig,
    random_examples: MakeExamples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make_config(**settings(micro_batch_size=8))
    examples, params = random_examples(50), start(config)
    small = run(
        task(changed(config, training={"micro_batch_size": 1}), params), examples, tmp_path / "a"
    )

    collate = training.collate_padded

    def out_of_memory(examples: Encoded, batch: list[int], pad_id: int) -> Any:
        if len(batch) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return collate(examples, batch, pad_id)

    monkeypatch.setattr(training, "collate_padded", out_of_memory)
    monkeypatch.setattr(load_model(config), "most_together", None)
    if not fitting:
        with pytest.raises(torch.OutOfMemoryError):
            run(task(config, params), examples, tmp_path / "b")
        return
    update = run(task(config, params), examples, tmp_path / "b")
    for name, value in small.delta.items():
        np.testing.assert_array_equal(update.delta[name], value)
    assert "training.micro_batch_size=1" in caplog.text


def test_dropout_draws_from_the_seed_of_run_round_and_client(
    make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    """With one example in a micro-batch and one length, both loops draw the same masks."""
    sections = settings(micro_batch_size=1) | {"lora": {"dropout": 0.3}}
    config = make_config(seed=3, **sections)
    examples = random_examples(50, shortest=20, longest=20)
    params = start(config)

    update = run(task(config, params, server_round=2), examples, tmp_path)
    plain = PlainClient(config, examples, params)
    set_seed(derive_seed(3, "dropout", 2, "a") % 2**32)
    torch.empty((), dtype=torch.int64).random_()  # a data loader draws a seed for its workers
    batches = [sorted(batch) for batch in drawn(config, examples, server_round=2)]
    expected = plain.train(batches, size=1)
    assert_near(update.delta, expected)

    without = PlainClient(make_config(seed=3, **settings()), examples, params).train(batches)
    assert max(float(np.abs(without[n] - expected[n]).max()) for n in expected) > 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fedprox_adds_the_gradient_of_the_proximal_term(
    optimizer: str, make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    config, examples = make_config(**settings(optimizer=optimizer)), random_examples(50)
    params, mu = start(config), 50.0

    update = run(task(config, params, mu=mu), examples, tmp_path)
    expected = PlainClient(config, examples, params, mu=mu).train(drawn(config, examples))
    plain = PlainClient(config, examples, params).train(drawn(config, examples))
    assert_near(update.delta, expected)
    assert max(float(np.abs(plain[n] - expected[n]).max()) for n in plain) > 20 * TOLERANCE


@pytest.mark.parametrize("mu", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("parts", [{}, {"micro_batch_size": 2}], ids=["whole", "in parts"])
def test_openfedllm_clips_the_proximal_term_with_the_loss(
    mu: float,
    parts: dict[str, int],
    make_config: MakeConfig,
    random_examples: MakeExamples,
    tmp_path: Path,
) -> None:
    """loss += mu/2 * norm(param - global)**2 for each parameter, and one clipping of it all."""
    config = make_config(**settings(optimizer="sgd", max_grad_norm=0.05, max_steps=6, **parts))
    examples, params = random_examples(50), start(config)

    def loop(as_openfedllm: bool) -> Params:
        plain = PlainClient(config, examples, params, mu=mu)
        optimizer = torch.optim.SGD(plain.weights.values(), lr=1.0)
        for batch in drawn(config, examples):
            optimizer.zero_grad()
            loss = plain.step_loss(batch)
            if as_openfedllm:
                for name, weight in plain.weights.items():
                    loss = loss + mu / 2 * torch.norm(weight - torch.tensor(params[name])) ** 2
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.weights.values(), 0.05)
            if not as_openfedllm:
                plain._add_proximal_gradient()
            optimizer.step()
        return {n: w.detach().numpy() - params[n] for n, w in plain.weights.items()}

    updates = {}
    for as_openfedllm in (True, False):
        variant = "openfedllm" if as_openfedllm else "paper"
        asked = task(config, params, mu=mu, variant=variant)
        asked = replace(asked, learning_rate=1.0)
        updates[as_openfedllm] = run(asked, examples, tmp_path).delta
        assert_near(updates[as_openfedllm], loop(as_openfedllm))
    apart = [np.abs(updates[True][n] - updates[False][n]).max() for n in params]
    assert max(apart) > 20 * TOLERANCE


def control(params: Params, seed: int) -> Params:
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, 0.02, v.shape).astype(np.float32) for n, v in params.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_scaffold_over_two_rounds(
    optimizer: str, make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    """g + c - c_i, and c_i+ is the mean clipped gradient: what option II gives under SGD."""
    config, examples = make_config(**settings(optimizer=optimizer)), random_examples(50)
    params = start(config)
    own = {name: np.zeros_like(value) for name, value in params.items()}

    for server_round in (1, 2):
        c = control(params, server_round)
        asked = task(config, params, server_round, name="scaffold", sent={"control": c})
        update = run(asked, examples, tmp_path)
        plain = PlainClient(config, examples, params, drift={n: c[n] - own[n] for n in c})
        assert_near(update.delta, plain.train(drawn(config, examples, server_round)))
        mean = plain.mean_gradient()
        assert_near(update.contributed["control_delta"], {n: mean[n] - own[n] for n in own}, 1e-5)
        own = {name: own[name] + update.contributed["control_delta"][name] for name in own}


def test_openfedllm_corrects_after_the_step_and_uses_option_two(
    make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    config, examples = make_config(**settings()), random_examples(50)
    params = start(config)
    c = control(params, 1)

    asked = task(config, params, name="scaffold", variant="openfedllm", sent={"control": c})
    update = run(asked, examples, tmp_path)
    plain = PlainClient(config, examples, params)
    steps = drawn(config, examples)
    expected = _train_and_correct_after_the_step(plain, steps, c)
    assert_near(update.delta, expected)
    assert update.contributed["control_delta"] is not None
    option_two = {n: -c[n] - expected[n] / (len(steps) * LEARNING_RATE) for n in c}
    assert_near(update.contributed["control_delta"], option_two, TOLERANCE / LEARNING_RATE)


def _train_and_correct_after_the_step(
    plain: PlainClient, steps: list[list[int]], c: Params
) -> Params:
    optimizer = torch.optim.AdamW(plain.weights.values(), lr=LEARNING_RATE, weight_decay=0.0)
    for batch in steps:
        optimizer.zero_grad()
        plain.step_loss(batch).backward()
        clip = plain.config.training.max_grad_norm
        torch.nn.utils.clip_grad_norm_(plain.weights.values(), clip)
        optimizer.step()
        with torch.no_grad():
            for name, weight in plain.weights.items():
                weight -= LEARNING_RATE * torch.from_numpy(c[name])
    return {n: w.detach().numpy() - plain.params[n] for n, w in plain.weights.items()}


def test_weight_decay_is_decoupled(
    make_config: MakeConfig, random_examples: MakeExamples, tmp_path: Path
) -> None:
    """AdamW multiplies the weights by 1 - lr * decay; at one step the rest is the same."""
    plain = make_config(**settings(max_steps=1))
    decayed = make_config(**settings(max_steps=1, weight_decay=0.5))
    examples, params = random_examples(50), start(plain)

    one = run(task(plain, params), examples, tmp_path).delta
    other = run(task(decayed, params), examples, tmp_path).delta
    assert_near(other, {n: one[n] - LEARNING_RATE * 0.5 * params[n] for n in one}, 1e-6)
