"""The node that answers messages: a site with its own data, or a simulated client."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from flwr.app import RecordDict

from fedllm_flwr.client.simulated import noted_state_dir
from fedllm_flwr.config import Config
from fedllm_flwr.config.ranks import divides, rank_of_client, with_rank
from fedllm_flwr.config.schema import Device
from fedllm_flwr.config.validation import check_processes
from fedllm_flwr.data.encode import KEEP
from fedllm_flwr.deployment.approval import AUTOMATIC, Requests
from fedllm_flwr.deployment.datasets import asked_dataset
from fedllm_flwr.deployment.ledger import Ledger
from fedllm_flwr.deployment.node import site_processes, site_rank, site_threads
from fedllm_flwr.deployment.policy import Policy, site_policy
from fedllm_flwr.deployment.site_state import SiteState, site_state
from fedllm_flwr.errors import RefusedError
from fedllm_flwr.federation.secure.site import SecureSite
from fedllm_flwr.models.fingerprint import model_fingerprint
from fedllm_flwr.tasks import task_of

if TYPE_CHECKING:
    from fedllm_flwr.data.client_data import ClientData

NodeConfig = Mapping[str, str | int | float | bool]


@dataclass(frozen=True)
class Site:
    """The node that answers a message: its node config, and Flower's ids."""

    node_config: NodeConfig
    run_id: int
    node_id: int

    @property
    def is_simulated(self) -> bool:
        """Whether this node is a simulated client, whose data belong to the server."""
        return "partition-id" in self.node_config

    @property
    def name(self) -> str:
        """Name of the site."""
        return str(self.node_config.get("client-name", f"client-{self.node_id}"))

    @cached_property
    def policy(self) -> Policy:
        """The site's policy; a simulated client, whose data belong to the server, has no limits."""
        return Policy.unlimited() if self.is_simulated else site_policy(self.node_config)

    @property
    def state(self) -> SiteState:
        """On-disk state of a site with its own data."""
        from fedllm_flwr.data.remembered import cache_dir

        return site_state(self.node_config, cache_dir() / "sites")

    def memory_folder(self, name: str, run: str, content: RecordDict) -> Path:
        """Directory of a client's memory of a run.

        A site derives it from its own node config; only a simulated client reads it from the
        message.
        """
        from fedllm_flwr.data.remembered import cache_dir

        if not self.is_simulated:
            return self.state.folder(run, name)
        noted = noted_state_dir(content)
        return SiteState(cache_dir() / "state").folder(run, name) if noted is None else noted / name

    def secure(self, name: str, content: RecordDict) -> SecureSite:
        """The client's part in secure aggregation.

        A site signs with its registered key, if it has one.
        """
        run = str(self.run_id)
        if self.is_simulated:
            folder = self.memory_folder(name, "secure", content) / "secure"
            return SecureSite(folder, folder / f"run-{run}", run, name)
        key = Path(str(self.node_config.get("site-dir", ""))).expanduser() / f"{name}.key"
        own = key if "site-dir" in self.node_config and key.is_file() else None
        of_run = self.state.runs / f"secure-{run}"
        return SecureSite(self.state.root / "secure", of_run, run, name, own)

    def own_config(self, config: Config, server_round: int = 0, run: str = "") -> Config:
        """The server's configuration, with the values that only this site decides.

        These are the data and how they are read, the model's directory, the device and the numbers
        of threads and processes.

        Args:
            server_round: round of the request, 0 before the first.
            run: the server's own id of the run.

        Raises:
            RefusedError: the site has no data, or the server names a model by a local path, exceeds
                the policy, or treats the site as a simulated client.
            ApprovalPending: the operator has not decided on the run yet.
            ApprovalDeclined: the operator has declined it.
            ConfigError: the site's number of processes cannot divide the training.
        """
        deployed = config.federation.engine == "deployment"
        if deployed == self.is_simulated:
            remedy = "drop" if deployed else "start the run with"
            kind = "a simulation" if deployed else "a deployment"
            raise RefusedError(f"this is {kind}; {remedy} federation.engine=deployment")
        if not deployed:
            return config
        own, policy = self.node_config, self.policy
        dataset = asked_dataset(own, config.data.site_dataset)
        path = config.model.path
        is_hub_id = path.count("/") == 1 and not path.startswith((".", "~", "/"))
        is_hub_id = is_hub_id and not Path(path).exists()  # relative to the working directory
        if "model-path" not in own and path != "embedded" and not is_hub_id:
            raise RefusedError(
                f"model.path={path} is no hub id; name this site's own copy with model-path in its "
                "node config"
            )
        asked = with_rank(config, self.rank(config, self.name))
        policy.check(asked, server_round, has_own_model="model-path" in own)
        if config.data.truncation == "drop":
            raise RefusedError(
                "the site refuses data.truncation=drop: how many records it trains on would depend "
                "on their lengths; use right or left"
            )
        policy.check_dataset(dataset.name)
        if policy.approval != AUTOMATIC:
            if "site-dir" not in own:
                raise RefusedError(
                    f"this site's policy.yaml says approval: {policy.approval}, but its node "
                    "config has no site-dir to keep requests in; add one, or set approval: "
                    "automatic"
                )
            requests = Requests(Path(str(own["site-dir"])).expanduser() / "requests")
            server = str(own.get("server-address", ""))
            requests.require(policy.approval, config, str(self.run_id), server, self.name)
        Ledger(self.state.ledger).count(str(self.run_id), config, policy, run)
        federation = replace(
            config.federation, client_cpus=site_threads(own), client_processes=site_processes(own)
        )
        check_processes(replace(config, federation=federation))
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
                path=str(own.get("model-path", path)),
                revision=None if "model-path" in own else config.model.revision,
            ),
            training=replace(config.training, device=cast(Device, own.get("device", "auto"))),
            federation=federation,
        )

    def rank(self, config: Config, name: str) -> int:
        """The rank of a client's adapter: the server's choice, limited by a site's ``lora-rank``.

        Raises:
            RefusedError: ``lora-rank`` is not a positive integer, or gives a fractional alpha.
        """
        rank = rank_of_client(config, name)
        own = None if self.is_simulated else site_rank(self.node_config)
        if own is None:
            return rank
        if own < rank and not divides(config.lora, own):
            raise RefusedError(
                f"lora.alpha={config.lora.alpha} with lora.r={config.lora.r} has no whole alpha "
                f"for this site's lora-rank={own}; set lora.alpha={2 * config.lora.r}"
            )
        return min(own, rank)

    def data(self, config: Config) -> "ClientData":
        """The client's tokenised records, for a configuration from `own_config`."""
        from fedllm_flwr.data.client_data import simulated_client, site_client
        from fedllm_flwr.models.tokenizer import load_tokenizer

        kind, tokenizer = task_of(config).records, load_tokenizer(config.model)
        if self.is_simulated:
            return simulated_client(config, kind, tokenizer, int(self.node_config["partition-id"]))
        state = self.state
        secret = state.secret() if self.policy.secret_draws else ""
        return site_client(config, kind, tokenizer, self.name, state.tokens, secret, state.digests)

    def model_identity(self, config: Config) -> str:
        """The base model that the site trains on: a digest, or a hub id with its commit."""
        if "model-path" in self.node_config:
            folder = Path(config.model.path).expanduser()
            return model_fingerprint(folder, self.state.root / "model.json")
        revision = config.model.revision
        return config.model.path if revision is None else f"{config.model.path}@{revision}"
