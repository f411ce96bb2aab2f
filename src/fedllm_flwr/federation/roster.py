"""The clients of a run, and the sampling of the clients of a round."""

import random
from collections.abc import Collection
from dataclasses import dataclass

from fedllm_flwr.config import Config
from fedllm_flwr.config.participation import min_replies, num_sampled
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import ClientInfo, printable
from fedllm_flwr.params import LARGEST_WEIGHT, derive_seed

_LONGEST_MODEL = 200  # characters of a site's description of its model


@dataclass(frozen=True)
class Client:
    """A participating node: its Flower node id in this run, and its description of itself.

    ``by_key``: the name belongs to a registered key, so no other node can use it.
    """

    node_id: int
    info: ClientInfo
    by_key: bool = False


Roster = dict[str, Client]
"""Clients by name."""


def choose_clients(roster: Roster, config: Config, server_round: int) -> list[str]:
    """Sample the clients of a round, deterministically from the seed and the names."""
    return choose_from(roster, config, server_round)


def choose_from(names: Collection[str], config: Config, server_round: int) -> list[str]:
    """As `choose_clients`, when only the names are known."""
    seed = derive_seed(config.seed, "sampling", server_round)
    wanted = num_sampled(config, len(names))
    return sorted(random.Random(seed).sample(sorted(names), wanted))


def check_roster(roster: Roster, config: Config) -> None:
    """Reject too few clients for a round, and too many examples for exact sums.

    Raises:
        FederationError: gives the numbers.
    """
    needed, sampled = min_replies(config, len(roster)), num_sampled(config, len(roster))
    if roster and needed > sampled:
        raise FederationError(
            f"federation.min_replies={needed} exceeds the {sampled} of "
            f"{len(roster)} clients sampled per round; lower it or sample more clients."
        )
    examples = sum(client.info.num_examples for client in roster.values())
    if examples > LARGEST_WEIGHT:
        raise FederationError(
            f"the clients announce {examples} examples, more than {LARGEST_WEIGHT:.0f}; look at "
            "their data files."
        )


def unlike_models(roster: Roster) -> list[str]:
    """A warning if sites train different base models, whose updates cannot be averaged."""
    sites: dict[str, list[str]] = {}
    for name, client in sorted(roster.items()):
        model = printable(client.info.model)[:_LONGEST_MODEL] if client.info.model else ""
        sites.setdefault(model, []).append(name)
    sites.pop("", None)  # simulated clients share one model
    if len(sites) < 2:
        return []
    groups = "; ".join(f"{', '.join(names)}: {model}" for model, names in sorted(sites.items()))
    return [f"the sites train different base models ({groups}); their average is meaningless"]
