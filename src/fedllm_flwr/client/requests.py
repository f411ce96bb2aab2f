"""The request handlers of a node: in simulation, in a ClientApp or in a resident trainer.

Importing this does not import torch.
"""

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import RecordDict

from fedllm_flwr import __version__
from fedllm_flwr.client.site import Site
from fedllm_flwr.config import Config
from fedllm_flwr.deployment.datasets import asked_dataset
from fedllm_flwr.deployment.ledger import Ledger
from fedllm_flwr.deployment.privacy_account import account_of
from fedllm_flwr.errors import (
    ApprovalPending,
    DataError,
    FedLLMError,
    LostDownloadError,
    NotFiniteError,
    RefusedError,
)
from fedllm_flwr.factors import rank_of
from fedllm_flwr.federation.downlink import received
from fedllm_flwr.federation.masked_round import as_words
from fedllm_flwr.federation.messages import (
    FROZEN,
    Assignment,
    ClientInfo,
    Failure,
    MaskedUpdate,
)
from fedllm_flwr.federation.wire import (
    pack_failure,
    pack_info,
    pack_masked,
    pack_opened,
    pack_scores,
    pack_signed,
    pack_update,
    unpack_assignment,
    unpack_query,
    unpack_unmask,
)
from fedllm_flwr.files import write_atomically

if TYPE_CHECKING:
    from fedllm_flwr.data.client_data import ClientData

logger = logging.getLogger(__name__)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def answer(kind: str, content: RecordDict, site: Site) -> RecordDict:
    """Answer a message of Flower's type `kind`: train, evaluate or query.

    Any error becomes a `Failure` with a text that may safely leave this site.
    """
    try:
        return HANDLERS[kind](content, site)
    except (ApprovalPending, LostDownloadError, NotFiniteError) as error:
        logger.warning("%s: %s", kind, error)
        return failed(error, site)
    except Exception as error:  # the server gets a reason instead of a timeout
        logger.exception("%s failed", kind)
        return failed(error, site)


def train(content: RecordDict, site: Site) -> RecordDict:
    """One round of local training: answers an `Assignment` with an `Update`."""
    from fedllm_flwr.client.local_round import train_locally

    assignment, data, dataset = accepted(content, site)
    config, policy = assignment.config, site.policy
    memory = site.memory_folder(data.name, assignment.run, content)
    if not site.is_simulated:
        policy.check_kept(assignment.round, assignment.oldest_checkpoint)
        site.state.make_room(assignment.run, policy.state_days, policy.max_state_gb)
        check_unchanged(config, memory, site.state.digests)
        account = account_of(site.node_config, site.state.root)
        run, server_round = assignment.run, assignment.round
        account.charge(config, dataset, len(data.train), policy, run, server_round)
    if not config.privacy.secure_aggregation:
        return pack_update(train_locally(assignment, data, memory), config.communication.dtype)
    if (session := assignment.session) is None:
        raise RefusedError("secure aggregation: the site refuses a round without keys")
    secure = site.secure(data.name, content)
    secure.check(session)
    update = train_locally(assignment, data, memory)
    words = as_words(update, session, len(data.train))
    sealed = secure.mask(session, words)
    return pack_masked(MaskedUpdate(words, sealed, update.num_examples, update.metrics))


def sign(content: RecordDict, site: Site) -> RecordDict:
    """Sign the list of a secure-aggregation round's survivors."""
    question = unpack_unmask(content)
    name = question.asked if site.is_simulated else site.name
    return pack_signed(site.secure(name, content).sign(question))


def unmask(content: RecordDict, site: Site) -> RecordDict:
    """Answer the last exchange of a secure-aggregation round with shares of masks."""
    question = unpack_unmask(content)
    name = question.asked if site.is_simulated else site.name
    return pack_opened(site.secure(name, content).unmask(question))


def evaluate(content: RecordDict, site: Site) -> RecordDict:
    """Score the global adapter on the node's held-out examples; only scores are sent back."""
    from fedllm_flwr.client.local_evaluation import evaluate_locally

    if site.policy.asks_for_privacy:
        raise RefusedError(
            "the site refuses to score: scores on its records are not covered by the privacy "
            "guarantee; set evaluation.clients=false"
        )
    assignment, data, _ = accepted(content, site)
    memory = site.memory_folder(data.name, assignment.run, content)
    return pack_scores(evaluate_locally(assignment, data, memory), len(data.held_out))


def query(content: RecordDict, site: Site) -> RecordDict:
    """Report this node's name and number of examples; a site is asked once per run.

    A site's number of examples depends only on its file, its settings and the task: whatever
    template or length the server chooses, no record is left out because of its length.
    """
    from fedllm_flwr.runs.fit import check_site_fit

    config = site.own_config(unpack_query(content))
    if site.is_simulated:
        data = site.data(config)
        rank = site.rank(config, data.name) % config.lora.r
        told = ClientInfo(data.name, len(data.train), __version__, rank=rank)
        return pack_info(with_card(told, config, content, site))
    ledger, run_id = Ledger(site.state.ledger), str(site.run_id)
    info = ledger.answer(run_id)
    if info is None:
        data = site.data(config)
        site.policy.check_records(config, len(data.train), len(data.held_out))
        check_site_fit(config, data.train)
        model = site.model_identity(config)
        rank = site.rank(config, data.name) % config.lora.r
        info = ClientInfo(data.name, len(data.train), __version__, model, rank)
        info = with_card(info, config, content, site)
        ledger.keep_answer(run_id, info)
    return pack_info(info)


def with_card(info: ClientInfo, config: Config, content: RecordDict, site: Site) -> ClientInfo:
    """`info` with the client's public keys, if the run uses secure aggregation."""
    if not config.privacy.secure_aggregation:
        return info
    return replace(info, card=site.secure(info.name, content).card().to_text())


HANDLERS: dict[str, Callable[[RecordDict, Site], RecordDict]] = {
    "train": train,
    "evaluate": evaluate,
    "query": query,
    "sign": sign,
    "unmask": unmask,
}


def accepted(content: RecordDict, site: Site) -> "tuple[Assignment, ClientData, str]":
    """A server's assignment with the site's own configuration, the site's data, and its name.

    Raises:
        FedLLMError: the policy forbids it, or the site's data do not fit it.
    """
    assignment = unpack_assignment(content)
    asked = assignment.config.data.site_dataset
    config = site.own_config(assignment.config, assignment.round, assignment.run)
    data = site.data(config)
    assignment = received(assignment, site.memory_folder(data.name, assignment.run, content))
    site.policy.check_tensors(assignment.params)
    site.policy.check_records(config, len(data.train), len(data.held_out))
    site.policy.check_rank("rank of frozen factors", rank_of(assignment.sent.get(FROZEN, {})))
    if (rank := rank_of(assignment.params)) > (most := site.rank(config, data.name)):
        raise RefusedError(f"an adapter of rank {rank} for {data.name}, which trains rank {most}")
    dataset = "" if site.is_simulated else asked_dataset(site.node_config, asked).name
    return replace(assignment, config=config), data, dataset


def check_unchanged(config: Config, memory: Path, digests: Path) -> None:
    """Reject a change of data during a run: client memory and sizes belong to the first data.

    Args:
        memory: the client's folder of the run.
        digests: folder that keeps file digests.

    Raises:
        DataError: the site's file differs from that of an earlier round of the run.
        FederationError: the folder cannot be written.
    """
    from fedllm_flwr.data.client_data import data_identity

    noted, identity = memory / "data.sha256", data_identity(config, digests)
    try:
        known = noted.read_text("utf-8").strip()
    except OSError:
        write_atomically(noted, f"{identity}\n".encode())
        return
    if known != identity:
        raise DataError(
            f"{config.data.path} has changed since this run began; put the old content back, or "
            f"start a new run (to continue this run with the new content, remove {noted})",
            "its data file has changed since the run began",
        )


def failed(error: Exception, site: Site) -> RecordDict:
    """The reply to a failed request.

    A site sends the server only a text that is meant for it, or the error's class; the site's log
    has the details.
    """
    kind, more = type(error).__name__, "the site's log says more"
    cause = error if isinstance(error, OSError) else error.__cause__
    os_error = cause.errno if isinstance(cause, OSError) else None
    shareable = error.shareable if isinstance(error, FedLLMError) else None
    if kind in ("OutOfMemoryError", "MemoryError"):
        reason = (
            "out of memory; lower training.micro_batch_size or training.max_length, or set "
            "training.gradient_checkpointing=true"
        )
    elif site.is_simulated:
        reason = str(error) if isinstance(error, FedLLMError) else f"{kind}: {error}"
    elif os_error in _DISK_FULL:
        reason = f"its disk is full ({os.strerror(os_error or 0)}); make room there"
    elif shareable is not None:
        reason = shareable if shareable == str(error) else f"{shareable}; {more}"
    elif os_error:
        reason = f"it cannot use a file of its own ({os.strerror(os_error)}); {more}"
    else:
        reason = f"{kind}; {more}"
    return pack_failure(Failure(kind, reason, str(site.node_config.get("client-name", ""))))
