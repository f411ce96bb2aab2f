"""``algorithm.options``: names and types, which only the rule knows."""

import pytest

from fedllm_flwr.config.schema import AlgorithmConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.federation.rule import find_rule


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fedex", {"max_rank": "abc"}, "options.max_rank=abc: .* valid integer"),
        ("fedex", {"max_rank": 1.5}, "options.max_rank=1.5: .* valid integer"),
        ("fedex", {"max_rank": True}, "options.max_rank=true: .* valid integer"),
        ("lora_fair", {"strength": "abc"}, "options.strength=abc: .* valid number"),
        ("ditto", {"pull": None}, "options.pull=null: .* valid number"),
        ("flexlora", {"by_rank": "maybe"}, "options.by_rank=maybe: .* valid boolean"),
        ("fedavg", {"eta": 5}, "options.eta: .* algorithm.eta; set that"),
        ("ditto", {"lambda": 5}, "options.lambda: .* no such setting; it takes pull"),
        ("fedavg", {"pull": 5}, "options.pull: .* no such setting; it takes no options"),
    ],
)
def test_a_wrong_option_is_named(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_rule(AlgorithmConfig(name=name, options=options))


def test_a_whole_number_is_a_number() -> None:
    rule = find_rule(AlgorithmConfig(name="lora_fair", options={"strength": 1}))
    assert rule.strength == 1  # type: ignore[attr-defined]
