"""What a node does with a message: in simulation, in a ClientApp or in a resident trainer.

Importing this does not import torch.
"""

import errno
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from flwr.app import RecordDict

from fedllm_flwr import __version__
from fedllm_flwr.client.simulated import noted_state_dir
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import Device
from fedllm_flwr.data.encode import KEEP
from fedllm_flwr.deployment.approval import AUTOMATIC, Requests
from fedllm_flwr.deployment.datasets import asked_dataset
from fedllm_flwr.deployment.ledger import Ledger
from fedllm_flwr.deployment.node import site_threads
from fedllm_flwr.deployment.policy import Policy, site_policy
from fedllm_flwr.deployment.state import SiteState, site_state
from fedllm_flwr.errors import ApprovalPending, DataError, FedLLMError, RefusedError
from fedllm_flwr.federation.messages import Assignment, ClientInfo, Failure
from fedllm_flwr.federation.wire import (
    pack_failure,
    pack_info,
    pack_scores,
    pack_update,
    unpack_assignment,
    unpack_query,
)
from fedllm_flwr.files import write_atomically
from fedllm_flwr.models.fingerprint import model_fingerprint
from fedllm_flwr.tasks import task_of

if TYPE_CHECKING:
    from fedllm_flwr.data.client_data import ClientData

logger = logging.getLogger(__name__)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

NodeConfig = Mapping[str, str | int | float | bool]


@dataclass(frozen=True)
class Site:
    """The node that answers: what its operator has configured, and Flower's ids."""

    node_config: NodeConfig
    run_id: int
    node_id: int

    @property
    def is_simulated(self) -> bool:
        """Whether this is a part of the server's own data, not a site with its own."""
        return "partition-id" in self.node_config

    @property
    def name(self) -> str:
        """What the site is called."""
        return str(self.node_config.get("client-name", f"client-{self.node_id}"))


def answer(kind: str, content: RecordDict, site: Site) -> RecordDict:
    """The answer to a message of Flower's type `kind`: train, evaluate or query.

    Whatever goes wrong, it is a `Failure` in wording that is safe to leave this site.
    """
    try:
        return _ANSWERS[kind](content, site)
    except ApprovalPending as error:
        logger.warning("%s: %s", kind, error)
        return failed(error, site)
    except Exception as error:  # the server gets a reason and not a hang
        logger.exception("%s failed", kind)
        return failed(error, site)


def failed(error: Exception, site: Site) -> RecordDict:
    """The answer of a node whose task has failed."""
    name = str(site.node_config.get("client-name", ""))
    return pack_failure(Failure(type(error).__name__, _reason(error, site), name))


def _train(content: RecordDict, site: Site) -> RecordDict:
    """One round of local training: an `Assignment` comes, an `Update` goes back."""
    from fedllm_flwr.client.local_round import train_locally

    assignment, data, policy = _assigned(content, site)
    config = assignment.config
    state_dir = state_folder(site, data.name, assignment.run, content)
    if not site.is_simulated:
        policy.check_kept(assignment.round, assignment.oldest_checkpoint)
        _state(site).make_room(assignment.run, policy.state_days, policy.max_state_gb)
        _check_unchanged(config, state_dir, _state(site).digests)
    return pack_update(train_locally(assignment, data, state_dir), config.communication.dtype)


def _evaluate(content: RecordDict, site: Site) -> RecordDict:
    """Score the global adapter on the node's held-out examples; only numbers go back."""
    from fedllm_flwr.client.local_evaluation import evaluate_locally

    assignment, data, _ = _assigned(content, site)
    return pack_scores(evaluate_locally(assignment, data), len(data.held_out))


def _assigned(content: RecordDict, site: Site) -> "tuple[Assignment, ClientData, Policy]":
    """A server's assignment with the site's own configuration, and the site's data and policy.

    Raises:
        FedLLMError: the policy forbids it, or the site's data cannot be used as asked.
    """
    assignment = unpack_assignment(content)
    policy = _policy(site)
    config = _own(assignment.config, site, policy, assignment.round, assignment.run)
    policy.check_tensors(assignment.params)
    data = _data(config, site, policy)
    policy.check_records(config, len(data.train), len(data.held_out))
    return replace(assignment, config=config), data, policy


def _query(content: RecordDict, site: Site) -> RecordDict:
    """Say who this node is and how many examples it holds; a site says it once in a run.

    A site's number follows from its file, its settings and the task alone: no record is left out
    for its length, whatever template or length the server asks for.
    """
    from fedllm_flwr.runs.fit import check_site_fit

    asked = unpack_query(content)
    policy = _policy(site)
    config = _own(asked, site, policy)
    if site.is_simulated:
        data = _data(config, site, policy)
        return pack_info(ClientInfo(data.name, len(data.train), __version__))
    ledger, run_id = Ledger(_state(site).ledger), str(site.run_id)
    info = ledger.answer(run_id)
    if info is None:
        data = _data(config, site, policy)
        policy.check_records(config, len(data.train), len(data.held_out))
        check_site_fit(config, data.train)
        info = ClientInfo(data.name, len(data.train), __version__, _model_identity(config, site))
        ledger.keep_answer(run_id, info)
    return pack_info(info)


_ANSWERS: dict[str, Callable[[RecordDict, Site], RecordDict]] = {
    "train": _train,
    "evaluate": _evaluate,
    "query": _query,
}


def _check_unchanged(config: Config, state_dir: Path, digests: Path) -> None:
    """A run's data stay the same: its control variates, and the sizes announced, are of them.

    Args:
        digests: folder where digests of files are kept.

    Raises:
        DataError: the site's file is another one than in an earlier round of the run.
        FederationError: the state directory cannot be written.
    """
    from fedllm_flwr.data.client_data import data_identity

    noted, identity = state_dir / "data.sha256", data_identity(config, digests)
    try:
        known = noted.read_text("utf-8").strip()
    except OSError:
        write_atomically(noted, f"{identity}\n".encode())
        return
    if known != identity:
        raise DataError(
            f"{config.data.path} has changed since this run began; put the old content back, or "
            f"start a new run (to let this one go on with the new content, remove {noted})",
            "its data file has changed since the run began",
        )


def _reason(error: Exception, site: Site) -> str:
    """What the server learns of an error: a text that was made for it, or the error's class."""
    kind = type(error).__name__
    if kind in ("OutOfMemoryError", "MemoryError"):
        return (
            "out of memory; lower training.micro_batch_size or training.max_length, or set "
            "training.gradient_checkpointing=true"
        )
    if site.is_simulated:
        return str(error) if isinstance(error, FedLLMError) else f"{kind}: {error}"
    more = "the site's log says more"
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
        return f"its disk is full ({os.strerror(cause.errno or 0)}); make room there"
    shareable = error.shareable if isinstance(error, FedLLMError) else None
    if shareable is not None:
        return shareable if shareable == str(error) else f"{shareable}; {more}"
    if isinstance(cause, OSError) and cause.errno:
        return f"it cannot use a file of its own ({os.strerror(cause.errno)}); {more}"
    return f"{kind}; {more}"


def _policy(site: Site) -> Policy:
    """The site's own; a simulated client's data are the server's."""
    return Policy.unlimited() if site.is_simulated else site_policy(site.node_config)


def _own(
    config: Config, site: Site, policy: Policy, server_round: int = 0, run: str = ""
) -> Config:
    """The server's configuration with what only this site decides.

    That is the data, how they are read and which of them count, the model's directory, the device
    and the number of threads.

    Args:
        server_round: that is asked for, 0 before the first.
        run: what the server's tasks call the run.

    Raises:
        RefusedError: the site has no data, or the server names a model by a local path, asks for
            more than the site allows, or takes a site for a simulated client.
    """
    deployed = config.federation.engine == "deployment"
    if deployed == site.is_simulated:
        remedy = "drop" if deployed else "start the run with"
        kind = "a simulation" if deployed else "a deployment"
        raise RefusedError(f"this is {kind}; {remedy} federation.engine=deployment")
    if not deployed:
        return config
    own = site.node_config
    dataset = asked_dataset(own, config.data.site_dataset)
    model_path = _model_path(config, own)
    policy.check(config, server_round, has_own_model="model-path" in own)
    if config.data.truncation == "drop":
        raise RefusedError(
            "the site refuses data.truncation=drop: how many records it trains on would depend on "
            "their lengths; use right or left"
        )
    policy.check_dataset(dataset.name)
    _require_approval(policy.approval, config, site)
    Ledger(_state(site).ledger).count(str(site.run_id), config, policy, run)
    cuts_left = config.data.truncation == "left" and task_of(config).can_cut_left
    return replace(
        config,
        data=dataset.config(
            name=config.data.name,
            template=config.data.template,
            truncation="left" if cuts_left else KEEP,
            validation_fraction=config.data.validation_fraction,
        ),
        model=replace(
            config.model,
            path=model_path,
            revision=None if "model-path" in own else config.model.revision,
        ),
        training=replace(config.training, device=cast(Device, own.get("device", "auto"))),
        federation=replace(config.federation, client_cpus=site_threads(own)),
    )


def _require_approval(rule: str, config: Config, site: Site) -> None:
    """Let a run go on that the policy's rule or the operator allows.

    Raises:
        ApprovalPending: the operator has not decided yet.
        ApprovalDeclined: the operator has declined it.
        RefusedError: the site has no directory to keep requests in.
    """
    if rule == AUTOMATIC:
        return
    own = site.node_config
    if "site-dir" not in own:
        raise RefusedError(
            f"this site's policy.yaml says approval: {rule}, but its node config has no site-dir "
            "to keep requests in; add one, or set approval: automatic"
        )
    requests = Requests(Path(str(own["site-dir"])).expanduser() / "requests")
    server = str(own.get("server-address", ""))
    requests.require(rule, config, str(site.run_id), server, site.name)


def _model_path(config: Config, own: NodeConfig) -> str:
    """The site's own copy of the model, or what the server names, if that is no local path."""
    path = config.model.path
    is_hub_id = path.count("/") == 1 and not path.startswith((".", "~", "/"))
    is_hub_id = is_hub_id and not Path(path).exists()  # below the folder that the site runs in
    if "model-path" not in own and path != "embedded" and not is_hub_id:
        raise RefusedError(
            f"model.path={path} is no hub id; name this site's own copy with model-path in its "
            "node config"
        )
    return str(own.get("model-path", path))


def _model_identity(config: Config, site: Site) -> str:
    """What tells the base model that the site trains on from others."""
    if "model-path" in site.node_config:
        folder = Path(config.model.path).expanduser()
        return model_fingerprint(folder, _state(site).root / "model.json")
    revision = config.model.revision
    return config.model.path if revision is None else f"{config.model.path}@{revision}"


def _data(config: Config, site: Site, policy: Policy) -> "ClientData":
    from fedllm_flwr.data.client_data import simulated_client, site_client
    from fedllm_flwr.models.tokenizer import load_tokenizer

    kind, tokenizer = task_of(config).records, load_tokenizer(config.model)
    if site.is_simulated:
        return simulated_client(config, kind, tokenizer, int(site.node_config["partition-id"]))
    state = _state(site)
    secret = state.secret() if policy.secret_draws else ""
    return site_client(config, kind, tokenizer, site.name, state.tokens, secret, state.digests)


def _state(site: Site) -> SiteState:
    """What a site with data of its own keeps on its disk."""
    from fedllm_flwr.data.remembered import cache_dir

    return site_state(site.node_config, cache_dir() / "sites")


def state_folder(site: Site, name: str, run: str, content: RecordDict) -> Path:
    """Where a client keeps its memory of a run.

    A site derives it from its own node config; only a simulated client takes it from the message.
    """
    from fedllm_flwr.data.remembered import cache_dir

    if not site.is_simulated:
        return _state(site).folder(run, name)
    noted = noted_state_dir(content)
    return SiteState(cache_dir() / "state").folder(run, name) if noted is None else noted / name
