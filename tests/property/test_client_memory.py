"""SCAFFOLD's c stays the mean of the clients' c_i, whatever is lost on the way."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.errors import FederationError
from quadratics import NUM_CLIENTS, Federation, config_of, one_round


def play(
    rounds: list[tuple[str, list[str], set[int]]], every: int, sampled: int, optimizer: str
) -> None:
    """Play the rounds; before and after each of them, c is the mean of the clients' c_i."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(optimizer=optimizer, sample_clients=sampled)
        federation = Federation(Path(folder), config, NUM_CLIENTS, every)
        for server, fates, wiped in rounds:
            if server == "a client joins":
                federation.join()
            if server != "go on":
                federation.restart(back=server == "go back")
            assert federation.offset() < 1e-14
            for index in wiped:
                federation.wipe(f"client-{index}")
            try:
                federation.round(**{f"client_{i}": fate for i, fate in enumerate(fates)})
            except FederationError as error:
                if "replies could be used" not in str(error):
                    raise
                federation.restart()
            assert federation.offset() < 1e-14


anything = {
    "rounds": st.lists(one_round, min_size=1, max_size=8),
    "every": st.integers(1, 3),
    "sampled": st.integers(2, NUM_CLIENTS),
    "optimizer": st.sampled_from(["sgd", "adamw"]),
}
test_c_is_the_mean_of_the_c_i_whatever_is_lost = settings(max_examples=12, deadline=None)(
    given(**anything)(play)
)
test_c_is_the_mean_of_the_c_i_in_many_more_histories = pytest.mark.slow(
    settings(max_examples=200, deadline=None)(given(**anything)(play))
)


def test_the_optimum_is_reached_whatever_was_lost(tmp_path: Path) -> None:
    """Float32 on the wire: the error ends at its resolution, near 1e-7, and stays there."""
    federation = Federation(tmp_path, config_of(), num_clients=4)
    fates = {3: "lost", 5: "late", 7: "refused", 9: "idle", 14: "lost"}
    for server_round in range(1, 41):
        if server_round == 10:
            federation.wipe("client-2")
        if server_round == 12:
            federation.restart(back=True)
        federation.round(client_1=fates.get(server_round, "ok"))
    assert federation.offset() < 1e-14
    assert federation.error() < 5e-7


def test_averaging_alone_ends_elsewhere(tmp_path: Path) -> None:
    """Otherwise the optimum would say nothing about the control variates."""
    federation = Federation(tmp_path, config_of("fedavg"), num_clients=4)
    for _ in range(30):
        federation.round()
    assert federation.error() > 0.05


def test_a_client_that_lost_its_memory_is_named_and_its_share_taken_out(tmp_path: Path) -> None:
    federation = Federation(tmp_path, config_of(), num_clients=3)
    for _ in range(3):
        federation.round()
    federation.wipe("client-2")
    told: list[dict[str, int]] = []
    federation.strategy.recorder.on_round = lambda _, report: told.append(report.lost)
    federation.round(client_2="lost")
    federation.round()
    federation.round()
    assert told == [{}, {"client-2": 3}, {}]
    assert federation.offset() < 1e-14


def test_a_run_cannot_go_on_without_the_servers_copies(tmp_path: Path) -> None:
    federation = Federation(tmp_path, config_of(), num_clients=2)
    federation.round()
    (tmp_path / "known/client-1/round-00001.safetensors").unlink()
    expected = r"control variate of client-1 of round 1 is not in .*client-1 any more; put it back"
    with pytest.raises(FederationError, match=expected):
        federation.restart()
