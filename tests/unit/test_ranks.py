"""Ranks of the clients' adapters: who has which, and what does not go together."""

from pathlib import Path

import pytest

from fedllm_flwr.client.site import Site
from fedllm_flwr.config.compose import compose
from fedllm_flwr.config.ranks import check_names, rank_of_client, with_rank
from fedllm_flwr.config.schema import Config, LoraConfig
from fedllm_flwr.deployment.node import node_config, site_rank
from fedllm_flwr.errors import ConfigError, FederationError, RefusedError
from fedllm_flwr.federation.messages import ClientInfo
from fedllm_flwr.federation.recorder import Recorder
from fedllm_flwr.federation.roster import Client
from fedllm_flwr.federation.rounds import Rounds
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.federation.state import ServerState

LORA = LoraConfig(r=8, alpha=16, ranks=["desk-1:4", "*-2:2", "desk-?:1"])


@pytest.mark.parametrize(
    ("name", "rank"), [("desk-1", 4), ("desk-2", 2), ("ward-2", 2), ("desk-7", 1), ("other", 8)]
)
def test_the_first_entry_that_fits_a_name_says_its_rank(name: str, rank: int) -> None:
    config = Config(lora=LORA)
    assert rank_of_client(config, name) == rank
    own = with_rank(config, rank).lora
    assert (own.r, own.alpha / own.r) == (rank, 2.0)


def test_an_entry_that_matches_no_client_is_an_error() -> None:
    check_names(Config(lora=LORA), ["desk-1", "ward-2"])
    with pytest.raises(ConfigError, match=r"^lora.ranks: desk-1:4 matches no .* are ward-2\.$"):
        check_names(Config(lora=LORA), ["ward-2"])


@pytest.mark.parametrize(("own", "rank"), [({}, 8), ({"lora-rank": 4}, 4), ({"lora-rank": 64}, 8)])
def test_a_site_trains_at_most_its_own_rank(own: dict[str, int], rank: int) -> None:
    site = Site({"client-name": "st-marys", **own}, 1, 2)
    assert site.rank(Config(), "st-marys") == rank


@pytest.mark.parametrize(
    ("own", "said"),
    [(0, "not a positive integer"), ("4", "not a positive integer"), (3, "set lora.alpha=16")],
)
def test_a_site_says_what_is_wrong_with_its_rank(own: object, said: str) -> None:
    config = Config(lora=LoraConfig(r=8, alpha=4))
    with pytest.raises(RefusedError, match=said):
        Site({"lora-rank": own}, 1, 2).rank(config, "a")  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm=flora", "lora.ranks=[a:16]"], "a:16 is above lora.r=8.*set lora.r=16"),
        (["algorithm=flora", "lora.ranks=[a]"], "not of the form name:rank"),
        (["algorithm=flora", "lora.ranks=[a:3]", "lora.alpha=4"], "1.5, is no whole number"),
        (["algorithm=fedavg", "lora.ranks=[a:4]"], "use algorithm=flexlora or hetlora or flora"),
        (["algorithm=flora", "lora.dora=true"], "use lora.dora=false"),
        (["algorithm=fedadam", "algorithm.factors=b", "lora.dora=true"], "use lora.dora=false"),
        (["algorithm=fedex", "lora.rslora=true"], "use lora.rslora=false"),
        (["algorithm=fedex", "algorithm.combiner=median"], "combines the clients' adapters itself"),
        (
            ["algorithm=flora", "privacy.unit=client", "privacy.noise_multiplier=1"],
            "individual adapters",
        ),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_loaded(
    overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(overrides)


@pytest.mark.parametrize(
    ("algorithm", "rank", "said"),
    [("fedavg", 4, "use algorithm=flexlora, hetlora or flora"), ("flora", 16, "the run has")],
)
def test_ranks_that_sites_announce_are_checked(
    algorithm: str, rank: int, said: str, tmp_path: Path
) -> None:
    config = compose([f"algorithm={algorithm}"])
    rounds = Rounds(find_rule(config.algorithm), config, Recorder(), tmp_path)
    roster = {"a": Client(1, ClientInfo("a", 100, "0", rank=rank))}
    with pytest.raises(FederationError, match=said):
        rounds._check_ranks(roster)
    assert ServerState(0, {}).adapter == {}


def test_a_site_reads_its_rank_before_a_run_and_refuses_other_keys(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('client-name = "a"\nlora-rnk = 4\n[columns]\noutput = "answer"\n')
    with pytest.raises(ConfigError, match="unknown key 'lora-rnk'"):
        node_config(tmp_path)
    file.write_text('lora-rank = "four"\n')
    with pytest.raises(RefusedError, match="not a positive integer"):
        site_rank(node_config(tmp_path))
    file.write_text("lora-rank = 4\n")
    assert site_rank(node_config(tmp_path)) == 4
