"""Which versions a round store keeps, and what it gives back."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.federation.round_store import RoundStore, folder_name
from fedllm_flwr.params import Kept


def kept(value: float) -> dict[str, Kept]:
    return {
        "control": Kept({"a": np.full((2, 3), value, np.float32)}, "of hospital-b"),
        "other": Kept({"b/c": np.ones(2)}),
    }


def played(directory: Path, *rounds: tuple[int, int, int]) -> list[int]:
    """The rounds that are kept after rounds of (round, acknowledged, oldest checkpoint)."""
    store = RoundStore(directory)
    for server_round, acknowledged, oldest in rounds:
        store.store(server_round, kept(server_round), acknowledged, oldest)
    return store.rounds()


def test_a_version_comes_back_bit_for_bit_and_only_under_its_round(tmp_path: Path) -> None:
    assert played(tmp_path, (3, 0, 0), (7, 3, 2)) == [3, 7]
    store = RoundStore(tmp_path)
    found = store.load(7)
    assert found is not None
    expected = kept(7)["control"].tensors["a"]
    assert found["control"].tensors["a"].tobytes() == expected.tobytes()
    assert found["other"].tensors["b/c"].tolist() == [1, 1]
    assert (found["control"].about, found["other"].about) == ("of hospital-b", "")
    assert store.load(5) is None


@pytest.mark.parametrize(
    ("rounds", "left"),
    [
        ([(1, 0, 0), (2, 1, 0), (3, 2, 1)], [1, 2, 3]),  # every=1, keep=2: back to round 1
        ([(1, 0, 0), (2, 1, 0), (3, 2, 1), (4, 3, 2)], [2, 3, 4]),
        ([(1, 0, 0), (3, 1, 0), (9, 3, 7)], [3, 9]),  # seldom sampled: round 7 knows of round 3
        ([(1, 0, 0), (3, 1, 0), (9, 3, 2)], [1, 3, 9]),  # round 2 knows of round 1
        ([(1, 0, 0), (2, 1, 0), (3, 1, 1), (4, 1, 2), (5, 1, 3)], [1, 5]),  # 2 to 4 were lost
        ([(1, 0, 0), (2, 1, 0), (3, 2, 1), (2, 1, 0)], [1, 2, 3]),  # the server goes back to 1
        ([(1, 0, 0), (2, 1, 0), (3, 2, 1), (2, 1, 0), (4, 2, 2)], [2, 4]),
    ],
)
def test_what_the_server_may_still_ask_for_is_kept(
    rounds: list[tuple[int, int, int]], left: list[int], tmp_path: Path
) -> None:
    assert played(tmp_path, *rounds) == left


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, empty])
def test_a_damaged_version_is_logged_and_not_replaced_by_another(
    damage: Callable[[Path], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    played(tmp_path, (1, 0, 0), (2, 1, 1))
    damage(tmp_path / "round-00002.safetensors")
    with caplog.at_level(logging.WARNING):
        assert RoundStore(tmp_path).load(2) is None
    assert "round-00002.safetensors" in caplog.text


def test_what_a_killed_process_was_writing_goes(tmp_path: Path) -> None:
    unfinished = tmp_path / ".round-00002.safetensors.0123456789ab"
    unfinished.write_bytes(b"half")
    assert played(tmp_path, (2, 0, 0)) == [2]
    assert not unfinished.exists()


def test_more_rounds_than_digits(tmp_path: Path) -> None:
    assert played(tmp_path, (99_999, 0, 0), (100_000, 99_999, 99_998)) == [99_999, 100_000]


@pytest.mark.parametrize("name", ["../up", "a/b", ".", "..", "St. Mary's", "naïve"])
def test_any_name_is_one_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / folder_name(name)
    assert folder.parent == tmp_path
    assert folder.resolve().parent == tmp_path.resolve()
