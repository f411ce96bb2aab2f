"""The adapter of its own that a run has left at a site."""

from dataclasses import replace
from pathlib import Path

from fedllm_flwr.config.parsing import from_dict
from fedllm_flwr.deployment.audit import AuditLog
from fedllm_flwr.deployment.ledger import Ledger
from fedllm_flwr.deployment.node import node_config, site_folder
from fedllm_flwr.deployment.site_state import site_state
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.federation.round_store import RoundStore
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.runs.kept_adapters import KeptAdapter


def personal_adapter(directory: str | Path, run: str) -> KeptAdapter:
    """The site's own adapter, as its newest round of a run has left it.

    With ``fedsa`` that is B_i with the A_i of the same round; the mean of the A_i is at the server.

    Args:
        directory: of ``fedllm site init``.
        run: Flower's id of the run, as in the audit log.

    Raises:
        ConfigError: no such run there, or one whose algorithm leaves no adapter at its clients.
    """
    folder = site_folder(directory)
    node = node_config(folder)
    state, name = site_state(node, folder / "state"), str(node["client-name"])
    entries = [e for e in AuditLog(folder / "audit").read().entries if e.get("settings_digest")]
    settings = {e["settings_digest"]: e["settings"] for e in entries if "settings" in e}
    digests = [e["settings_digest"] for e in entries if e.get("run") == run]
    if not digests or digests[-1] not in settings:
        raise ConfigError(
            f"{run}: no run of this id in the audit log; `fedllm site log` lists them"
        )
    config = from_dict(settings[digests[-1]])
    kind = find_rule(config.algorithm).personal
    if kind is None:
        raise ConfigError(
            f"{run}: algorithm={config.algorithm.name} leaves no adapter at its clients; fedsa and "
            "ditto do."
        )
    stores = [RoundStore(state.folder(own, name)) for own in Ledger(state.ledger).runs_of(run)]
    kept = [(store, number) for store in stores for number in store.rounds()]
    if not kept:
        raise ConfigError(
            f"{run}: this site keeps nothing of it; no round has come, or it was removed"
        )
    store, number = kept[-1]
    model = config.model
    if "model-path" in node:
        model = replace(model, path=str(node["model-path"]), revision=None)
    training = replace(config.training, device=node.get("device", "auto"))
    config = replace(config, model=model, training=training)
    return KeptAdapter(f"{name}, round {number}", config, store.file(number), kind, client=name)
