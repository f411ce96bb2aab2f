"""One client's round: from the server's task to the client's update."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.config import Config
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.errors import ConfigError, DataError, ModelError, RefusedError
from fedllm_flwr.federation.client_memory import ClientMemory
from fedllm_flwr.federation.control import ClientControl
from fedllm_flwr.federation.messages import Task, Update
from fedllm_flwr.models.adapted_model import AdaptedModel, hide_libraries, load_model
from fedllm_flwr.models.device import micro_batch_size, torch_threads
from fedllm_flwr.params import derive_seed, subtract
from fedllm_flwr.tasks import task_of
from fedllm_flwr.tasks.base import LocalWork, TrainingTask
from fedllm_flwr.training.batches import RoundBatches, round_batches
from fedllm_flwr.training.drift import DriftCorrection
from fedllm_flwr.training.schedule import draw_examples, steps_per_round

Drawn = NDArray[np.int64]


def train_locally(task: Task, data: ClientData, state_dir: Path) -> Update:
    """Train the task's adapter on the client's examples and return what changed.

    Args:
        state_dir: where this client remembers the run: SCAFFOLD's control variate, its own adapter
            where clients train alone, and what the training task keeps.

    Raises:
        FedLLMError: the data or the model cannot be used as asked.
    """
    hide_libraries()
    with torch_threads(task.config.federation.client_cpus):
        return _train(task, data, state_dir)


def _train(task: Task, data: ClientData, state_dir: Path) -> Update:
    started = time.monotonic()
    config = task.config
    if not len(data.train):
        raise DataError(f"{data.name} has no usable training example")
    model = load_model(config)
    task.check_fits(model.check)
    _check_fit(data, model, config)
    wanted = {"control"} if task.control is not None else set()
    memory = ClientMemory.recall(task, state_dir, wanted | ({"adapter"} if task.alone else set()))
    entry = task_of(config)
    drawn = _draw(task, data)
    work = LocalWork(
        config=config,
        model=model,
        examples=data.train,
        drawn=drawn,
        batches=_batches(task, data, model, drawn, entry),
        learning_rate=task.learning_rate,
        seed=derive_seed(config.seed, "dropout", task.round, data.name),
        tensors={} if task.reference is None else {"reference": task.reference},
        remembered=memory.groups,
    )
    kept = entry.prepare(work)
    model.load(memory.groups.get("adapter", task.params))
    control = ClientControl.of(task, memory.groups.get("control"))
    drift = DriftCorrection(model.trainable(), task.correction, control.drift(), task.learning_rate)
    result = entry.optimise(work, kept, [drift], drift.penalty)
    trained = model.params()
    delta = subtract(trained, task.params)
    own_control, control_delta = control.finish(delta, drift.mean_gradient(), drift.steps)
    if own_control is not None:
        kept["control"] = own_control
    if task.alone:
        kept["adapter"] = trained
    ClientMemory.keep(task, state_dir, kept)
    return Update(
        delta=delta,
        num_examples=len(np.unique(drawn)),
        control_delta=control_delta,
        lost=memory.lost,
        metrics={
            "loss": result.loss,
            **result.metrics,
            "steps": float(drift.steps),
            "tokens": float(work.batches.num_tokens),
            "computed_tokens": float(work.batches.computed_tokens),
            "seconds": time.monotonic() - started,
        },
    )


def _check_fit(data: ClientData, model: AdaptedModel, config: Config) -> None:
    """Refuse token ids and positions that the base model has no weights for."""
    vocabulary = model.peft.get_input_embeddings().weight.shape[0]
    largest, longest = int(data.train.tokens.max()), int(data.train.lengths.max())
    if largest >= vocabulary:
        raise ModelError(
            f"model.path={config.model.path}: its tokenizer makes token {largest}, but the model "
            f"has {vocabulary}; use the tokenizer that the model was made with.",
            "its model's tokenizer is not the one that the model was made with",
        )
    context = getattr(model.peft.get_base_model().config, "max_position_embeddings", None)
    asked = (
        f"training.max_length={config.training.max_length}, but the model takes {context} tokens"
    )
    remedy = f"set training.max_length={context}"
    if context is not None and config.federation.engine == "deployment":
        # Whether an example of the site is so long is not for the server to learn.
        if config.training.max_length > context:
            raise RefusedError(f"{asked}; {remedy}")
    elif context is not None and longest > context:
        raise ConfigError(f"{asked} and {data.name} has {longest} in an example; {remedy}")


def _draw(task: Task, data: ClientData) -> Drawn:
    """Indices of the round's examples, in the order in which they are trained on."""
    training, count = task.config.training, len(data.train)
    per_step = training.batch_size * training.gradient_accumulation_steps
    total = steps_per_round(training, count) * per_step
    updates = task.acknowledged.updates
    return draw_examples(count, total, updates, task.config.seed, data.draw_name(total))


def _batches(
    task: Task, data: ClientData, model: AdaptedModel, drawn: Drawn, entry: TrainingTask
) -> RoundBatches:
    """The round's micro-batches."""
    config, examples = task.config, data.train
    steps, rows = steps_per_round(config.training, len(examples)), entry.rows_per_example
    size = micro_batch_size(config.training, model.device, model.num_base_parameters, rows)
    has_flash, wanted = model.attention == "flash_attention_2", config.training.packing
    packed = entry.can_pack and (has_flash if wanted is None else wanted)
    batches = round_batches(drawn, examples.lengths, steps, size, packed)
    return replace(
        batches,
        num_tokens=examples.num_tokens_of(drawn),
        computed_tokens=rows * batches.computed_tokens,
    )
