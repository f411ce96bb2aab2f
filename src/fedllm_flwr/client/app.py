"""The Flower ClientApp: answers the server's messages. Importing it does not import torch."""

import logging
import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedllm_flwr.client.disclosure import audited
from fedllm_flwr.client.requests import answer, failed
from fedllm_flwr.client.resident.caller import answer_by_resident
from fedllm_flwr.client.simulated import noted_index
from fedllm_flwr.client.site import Site
from fedllm_flwr.deployment.node import choose_gpus
from fedllm_flwr.deployment.programs import is_confined
from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.errors import RefusedError

logger = logging.getLogger(__name__)

prepare_environment()
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training: answers an `Assignment` with an `Update`."""
    return _reply("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the global adapter on the client's held-out examples; only scores are sent back."""
    return _reply("evaluate", message, context)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Report this client's name and number of examples."""
    return _reply("query", message, context)


@app.query("sign")
def sign(message: Message, context: Context) -> Message:
    """Sign the list of a secure-aggregation round's survivors."""
    return _reply("sign", message, context)


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Answer the last exchange of a secure-aggregation round with shares of masks."""
    return _reply("unmask", message, context)


def _reply(kind: str, message: Message, context: Context) -> Message:
    """Answer in this process for a simulated client, or by the resident trainer for a site."""
    node_config = dict(context.node_config)
    if "partition-id" in node_config and (index := noted_index(message.content)) is not None:
        node_config["partition-id"] = index
    site = Site(node_config, context.run_id, context.node_id)
    if site.is_simulated:
        return Message(answer(kind, message.content, site), reply_to=message)
    started = time.monotonic()
    try:
        require_confined(site)
        choose_gpus(site.node_config)
        content = answer_by_resident(kind, message.content, site, message.metadata.ttl)
    except Exception as error:  # Flower would send its text to the server
        logger.exception("%s failed", kind)
        content = failed(error, site)
    return Message(audited(kind, message.content, content, site, started), reply_to=message)


def require_confined(site: Site) -> None:
    """Require that the node cannot run a server's code, unless the site's operator allows it.

    Flower's own program loads any app that a server's bundle names, so a site must use
    `fedllm site start`, which loads only this app.

    Raises:
        RefusedError: Flower's own program has loaded this app.
    """
    if is_confined():
        return
    if site.node_config.get("trust-server-code") is not True:
        logger.error(
            "this SuperNode was started by Flower's own program, which runs code that a server "
            "sends; start it with `fedllm site start` (trust-server-code=true in its node config "
            "lets it answer anyway)"
        )
        raise RefusedError("its operator has to start it with `fedllm site start`")
    logger.warning(
        "trust-server-code=true: this SuperNode runs whatever code a server sends in a run's bundle"
    )
