"""The Flower ClientApp: unpack, call, pack. Importing it does not import torch."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.errors import ConfigError, DataError, FedLLMError
from fedllm_flwr.messages import ClientInfo, Failure
from fedllm_flwr.wire import (
    pack_failure,
    pack_info,
    pack_scores,
    pack_update,
    unpack_query,
    unpack_task,
)

if TYPE_CHECKING:
    from fedllm_flwr.data.client import ClientData

logger = logging.getLogger(__name__)

prepare_environment()
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training: a `Task` comes, an `Update` goes back."""

    def answer() -> RecordDict:
        from fedllm_flwr.training.local import train_locally

        task = unpack_task(message.content)
        config = _own(task.config, context)
        data = _data(config, context)
        update = train_locally(replace(task, config=config), data, _state_dir(context, data.name))
        return pack_update(update, config.communication.dtype)

    return _reply(message, context, answer)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the global adapter on the client's held-out examples; only numbers go back."""

    def answer() -> RecordDict:
        from fedllm_flwr.evaluation.client import evaluate_locally

        task = unpack_task(message.content)
        config = _own(task.config, context)
        data = _data(config, context)
        scores = evaluate_locally(replace(task, config=config), data)
        return pack_scores(scores, len(data.held_out))

    return _reply(message, context, answer)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this client is and how many examples it holds."""

    def answer() -> RecordDict:
        config = _own(unpack_query(message.content), context)
        data = _data(config, context)
        return pack_info(ClientInfo(data.name, len(data.train), __version__))

    return _reply(message, context, answer)


def _reply(message: Message, context: Context, answer: Callable[[], RecordDict]) -> Message:
    """The answer, or a `Failure` in wording that is safe to leave this client."""
    try:
        content = answer()
    except Exception as error:  # whatever went wrong, the server gets a reason and not a hang
        logger.exception("%s failed", message.metadata.message_type)
        content = pack_failure(Failure(type(error).__name__, _reason(error, context)))
    return Message(content, reply_to=message)


def _reason(error: Exception, context: Context) -> str:
    """What the server learns of an error: nothing that may quote a site's data."""
    kind = type(error).__name__
    if kind == "OutOfMemoryError":
        return (
            "out of memory; lower training.micro_batch_size or training.max_length, or set "
            "training.gradient_checkpointing=true"
        )
    if not _is_simulated(context):
        if isinstance(error, FedLLMError) and not isinstance(error, DataError):
            return str(error)
        return f"{kind}; the site's log says more"
    return str(error) if isinstance(error, FedLLMError) else f"{kind}: {error}"


def _is_simulated(context: Context) -> bool:
    return "partition-id" in context.node_config


def _own(config: Config, context: Context) -> Config:
    """The server's configuration with what only this site decides: its paths and its device.

    Raises:
        ConfigError: the site has no data, or the server names a model by a local path, or takes
            a site for a simulated client, or the other way round.
    """
    site, deployed = context.node_config, config.federation.engine == "deployment"
    if deployed == _is_simulated(context):
        remedy = "drop" if deployed else "start the run with"
        kind = "a simulation" if deployed else "a deployment"
        raise ConfigError(f"this is {kind}; {remedy} federation.engine=deployment")
    if not deployed:
        return config
    if "data-path" not in site:
        raise ConfigError(
            "this site's node config lacks data-path; start its SuperNode with "
            '--node-config \'client-name="..." data-path="..."\''
        )
    model_path = str(site.get("model-path", config.model.path))
    is_hub_id = model_path.count("/") == 1 and not model_path.startswith((".", "~", "/"))
    if "model-path" not in site and model_path != "embedded" and not is_hub_id:
        raise ConfigError(
            f"model.path={model_path} is no hub id; name this site's own copy with model-path in "
            "its node config"
        )
    data = replace(
        config.data, path=str(site["data-path"]), eval_path=None, eval_split=None, max_samples=None
    )
    return replace(
        config,
        data=data,
        model=replace(config.model, path=model_path),
        training=replace(config.training, device=str(site.get("device", "auto"))),
    )


def _data(config: Config, context: Context) -> "ClientData":
    from fedllm_flwr.data.client import simulated_client, site_client
    from fedllm_flwr.training.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    if _is_simulated(context):
        return simulated_client(config, tokenizer, int(context.node_config["partition-id"]))
    name = str(context.node_config.get("client-name", f"client-{context.node_id}"))
    return site_client(config, tokenizer, name)


def _state_dir(context: Context, name: str) -> Path:
    """Where this client keeps its state of the run."""
    from fedllm_flwr.data.client import cache_dir

    default = os.environ.get("FEDLLM_STATE_DIR", cache_dir() / "state" / str(context.run_id))
    return Path(str(context.node_config.get("state-dir", default))).expanduser() / name
