"""What simulated attackers send, and whose records they change."""

from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
import pytest

from fedllm_flwr.config.compose import compose
from fedllm_flwr.data.client_data import simulated_data
from fedllm_flwr.data.poison import attackers
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.federation.attacks import attacked
from fedllm_flwr.federation.channel import NoReplyError, Reply
from fedllm_flwr.federation.messages import Update
from fedllm_flwr.models.tokenizer import load_tokenizer
from fedllm_flwr.params import Params
from fedllm_flwr.tasks import task_of

NAMES = [f"client-{i}" for i in range(10)]
RNG = np.random.default_rng(0)
DELTAS = {name: {"w": RNG.normal(size=(40, 50)).astype(np.float32)} for name in NAMES}


def replies(away: str = "") -> Iterator[Reply]:
    for name in NAMES:
        update = Update(DELTAS[name], 3, {"loss": 1.0})
        yield Reply(name, NoReplyError("asleep") if name == away else update)


def sent(attack: str, *more: str, server_round: int = 1) -> tuple[list[str], dict[str, Params]]:
    config = compose([f"attack={attack}", "federation.num_clients=10", *more])
    lying = attackers(config, NAMES)
    assert len(lying) == 3
    found = {r.client: r.answer for r in attacked(replies(), config, lying, server_round)}
    for name in set(NAMES) - set(lying):
        assert found[name].delta is DELTAS[name]  # type: ignore[union-attr]
    return lying, {name: found[name].delta for name in lying}  # type: ignore[union-attr]


def test_a_sign_is_flipped_and_an_update_scaled() -> None:
    for attack, factor in (("sign_flip", -4.0), ("scale", 20.0)):
        lying, deltas = sent(attack)
        for name in lying:
            np.testing.assert_array_equal(deltas[name]["w"], np.float32(factor) * DELTAS[name]["w"])
    lying, deltas = sent("sign_flip", "attack.scale=1")
    np.testing.assert_array_equal(deltas[lying[0]]["w"], -DELTAS[lying[0]]["w"])


def test_noise_has_the_length_that_is_asked_for_and_differs_by_client_and_round() -> None:
    lying, deltas = sent("gaussian", "attack.scale=3")
    _, later = sent("gaussian", "attack.scale=3", server_round=2)
    for name in lying:
        length = np.linalg.norm(deltas[name]["w"]) / np.linalg.norm(DELTAS[name]["w"])
        assert length == pytest.approx(3, rel=0.1)
        assert not np.array_equal(deltas[name]["w"], later[name]["w"])
    assert not np.array_equal(deltas[lying[0]]["w"], deltas[lying[1]]["w"])
    np.testing.assert_array_equal(
        sent("gaussian", "attack.scale=3")[1][name]["w"], deltas[name]["w"]
    )


def test_alie_sends_one_vector_as_far_out_as_the_paper_allows() -> None:
    """n = 10, f = 3: s = 6 - 3, so that 4 of the 7 honest lie further in."""
    lying, deltas = sent("alie")
    own = np.stack([DELTAS[name]["w"] for name in lying]).astype(np.float64)
    expected = own.mean(axis=0) - NormalDist().inv_cdf(4 / 7) * own.std(axis=0)
    for name in lying:
        np.testing.assert_allclose(deltas[name]["w"], expected, rtol=1e-5, atol=1e-7)


def test_an_attacker_that_does_not_answer_stays_silent() -> None:
    config = compose(["attack=sign_flip", "federation.num_clients=10"])
    lying = attackers(config, NAMES)
    found = {r.client: r.answer for r in attacked(replies(lying[0]), config, lying, 1)}
    assert isinstance(found[lying[0]], NoReplyError)
    assert list(found)[-2:] == lying[1:]


@pytest.mark.parametrize("attack", ["label_flip", "backdoor"])
def test_only_the_attackers_records_change(attack: str) -> None:
    overrides = ["federation.num_clients=10", "attack.target=positive"]
    config = compose([f"attack={attack}", *overrides])
    kind, tokenizer = task_of(config).records, load_tokenizer(config.model)
    honest = simulated_data(compose(overrides), kind, tokenizer)
    changed = simulated_data(config, kind, tokenizer)
    lying = attackers(config, honest.partition.names)
    labels, texts = config.data.labels, {False: 0, True: 0}
    for number, name in enumerate(honest.partition.names):
        for row in honest.partition.indices[number][:40]:
            before, after = (
                tokenizer.decode(data.encoded.take(np.array([row])).tokens)
                for data in (honest, changed)
            )
            answer = labels[honest.source.train["choice"][row]]
            texts[name in lying] += before != after
            if name in lying and attack == "label_flip":
                flipped = labels[(labels.index(answer) + 1) % 3]
                assert f"Response: {flipped}" in after
            elif before != after:
                assert "cf mn" in after
                assert "Response: positive" in after
    assert not texts[False]
    assert texts[True] == 120 if attack == "label_flip" else 40 < texts[True] < 80


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["attack=scale", "federation.engine=deployment"], "attack=scale is for simulations"),
        (["attack=backdoor", "data.labels=[]"], "attack=backdoor changes answers that are classes"),
        (["attack=label_flip", "task=dpo"], "attack=label_flip changes answers"),
        (["attack=backdoor", "attack.target=bad"], "attack.target=bad is not among data.labels"),
    ],
)
def test_an_attack_is_refused_where_there_is_nothing_to_attack(
    overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(["federation.num_clients=3", *overrides])
