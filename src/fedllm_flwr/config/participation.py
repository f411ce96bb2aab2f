"""The number of clients sampled per round, and the minimum number of replies."""

from fedllm_flwr.config.schema import Config


def num_sampled(config: Config, num_clients: int) -> int:
    """Clients per round: all with algorithm.participation=all, otherwise federation.sample_clients.

    If that is null: federation.sample_fraction of all clients, rounded, but at least one.
    """
    federation = config.federation
    if config.algorithm.participation == "all":
        return num_clients
    if federation.sample_clients is not None:
        return min(federation.sample_clients, num_clients)
    return max(1, round(federation.sample_fraction * num_clients))


def min_replies(config: Config, num_clients: int) -> int:
    """Minimum number of usable replies per round; by default more than half of the sampled clients.

    Otherwise the updates of very few clients could cause a full server step.
    """
    chosen = config.federation.min_replies
    return num_sampled(config, num_clients) // 2 + 1 if chosen is None else chosen


def describe_local(config: Config) -> str:
    """Table footnote that tells in which rounds the clients of ``algorithm=local`` trained."""
    chosen = config.algorithm.participation
    rounds = {
        "all": "in every round",
        "sampled": "only in the rounds in which a federation would have sampled it",
    }
    clients = "mean over the clients of the local baseline"
    return f"{clients}, each {rounds[chosen]} (participation={chosen})"
