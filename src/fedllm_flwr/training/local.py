"""One client's round: from the server's task to the client's update."""

import time
from pathlib import Path

from fedllm_flwr.config import Config
from fedllm_flwr.data.client import ClientData
from fedllm_flwr.errors import ConfigError, DataError, ModelError
from fedllm_flwr.messages import Task, Update
from fedllm_flwr.params import derive_seed, subtract
from fedllm_flwr.schedule import draw_examples, steps_per_round
from fedllm_flwr.training.batches import RoundBatches, round_batches
from fedllm_flwr.training.control import ClientControl
from fedllm_flwr.training.device import micro_batch_size, torch_threads
from fedllm_flwr.training.drift import DriftCorrection
from fedllm_flwr.training.model import AdaptedModel, load_model
from fedllm_flwr.training.sft import train_sft
from fedllm_flwr.versions import newest_version, store_version


def train_locally(task: Task, data: ClientData, state_dir: Path) -> Update:
    """Train the task's adapter on the client's examples and return what changed.

    Args:
        state_dir: where this client keeps its state of the run: SCAFFOLD's control variate, and
            its own adapter where clients train alone.

    Raises:
        FedLLMError: the data or the model cannot be used as asked.
    """
    with torch_threads(task.config.federation.client_cpus):
        return _train(task, data, state_dir)


def _train(task: Task, data: ClientData, state_dir: Path) -> Update:
    started = time.monotonic()
    config, training = task.config, task.config.training
    if not len(data.train):
        raise DataError(f"{data.name} has no usable training example")
    model = load_model(config)
    _check_fit(data, model, config)
    own = newest_version(state_dir, "adapter", task.round, task.params) if task.alone else None
    model.load(own or task.params)
    control = ClientControl.of(task, state_dir)
    drift = DriftCorrection(model.trainable(), task.correction, control.drift(), task.learning_rate)
    packed = _packed(config, model)
    batches, distinct = _batches(task, data, model, packed)
    result = train_sft(
        model,
        data.train,
        batches,
        training,
        learning_rate=task.learning_rate,
        seed=derive_seed(config.seed, "dropout", task.round, data.name),
        packed=packed,
        callbacks=[drift],
    )
    trained = model.params()
    if task.alone:
        store_version(state_dir, "adapter", task.round, trained)
    delta = subtract(trained, task.params)
    control_delta = control.finish(delta, drift.mean_gradient(), result.steps)
    return Update(
        delta=delta,
        num_examples=distinct,
        control_delta=control_delta,
        metrics={
            "loss": result.loss,
            "steps": float(result.steps),
            "tokens": float(batches.num_tokens),
            "computed_tokens": float(batches.computed_tokens),
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
            f"has {vocabulary}; use the tokenizer that the model was made with."
        )
    context = getattr(model.peft.get_base_model().config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ConfigError(
            f"training.max_length={config.training.max_length}, but the model takes {context} "
            f"tokens and {data.name} has {longest} in an example; set training.max_length={context}"
        )


def _batches(
    task: Task, data: ClientData, model: AdaptedModel, packed: bool
) -> tuple[RoundBatches, int]:
    """The round's micro-batches, and the number of distinct examples in them."""
    config, training = task.config, task.config.training
    steps = steps_per_round(training, len(data.train))
    per_step = training.batch_size * training.gradient_accumulation_steps
    drawn = draw_examples(len(data.train), steps * per_step, task.round, config.seed, data.name)
    size = micro_batch_size(training, model.device, model.num_base_parameters)
    batches = round_batches(drawn, data.train.lengths, steps, size, packed)
    return batches, len(set(drawn.tolist()))


def _packed(config: Config, model: AdaptedModel) -> bool:
    """Whether examples go through the model end to end, without padding."""
    requested = config.training.packing
    return model.attention == "flash_attention_2" if requested is None else requested
