"""Atomic, bit-exact checkpoints."""

import errno
import os

import numpy as np
import pytest

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.state import ServerState, load_state, save_state
from fedllm_flwr.federation.tensor_files import load_params
from fedllm_flwr.files import write_atomically

AWKWARD = [np.pi, -0.0, 5e-324, 1e-12, 1.0 + 2.0**-52, 1e300]


def state(server_round, control=True):
    rng = np.random.default_rng(server_round)
    params = {
        "a.lora_A.weight": rng.normal(size=(3, 2)).astype(np.float32),
        "a/odd name": np.asarray(rng.normal(), np.float32),
        "b": rng.normal(size=(4, 6)).astype(np.float32).T[::2],  # not contiguous
    }
    moments = {
        "m": {name: value.astype(np.float64) / 3 for name, value in params.items()},
        "v": {"a": np.array(AWKWARD)},
    }
    tensors = moments | ({"control": moments["m"]} if control else {})
    return ServerState(server_round, params, tensors, {"reference": params} if control else {})


def assert_bit_equal(left, right):
    assert left.round == right.round
    groups = [(left.params, right.params)]
    assert left.tensors.keys() == right.tensors.keys()
    groups += [(left.tensors[name], right.tensors[name]) for name in left.tensors]
    for mine, other in groups:
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name].dtype == other[name].dtype
            assert mine[name].shape == other[name].shape
            assert mine[name].tobytes() == other[name].tobytes()


@pytest.mark.parametrize("control", [True, False])
def test_round_trip_is_bit_exact(tmp_path, control):
    save_state(tmp_path, state(7, control), keep=2)
    loaded, warnings = load_state(tmp_path)
    assert_bit_equal(loaded, state(7, control))
    assert warnings == []
    assert ("control" in loaded.tensors) is control
    assert loaded.sent.keys() == ({"reference"} if control else set())


def test_newest_are_kept_in_numerical_order(tmp_path):
    for server_round in (99_998, 99_999, 100_000, 100_001):
        save_state(tmp_path, state(server_round), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "round-100000.safetensors",
        "round-100001.safetensors",
    ]
    assert load_state(tmp_path)[0].round == 100_001


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_newest_falls_back_with_a_warning(tmp_path, share):
    save_state(tmp_path, state(1), keep=3)
    newest = save_state(tmp_path, state(2), keep=3)
    data = newest.read_bytes()
    newest.write_bytes(data[: int(len(data) * share)])
    loaded, warnings = load_state(tmp_path)
    assert_bit_equal(loaded, state(1))
    assert len(warnings) == 1
    assert "round-00002.safetensors" in warnings[0]
    assert "Falling back" in warnings[0]


def test_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    """In the tensors, in the digest, in names and numbers of the header: the older one is used."""
    save_state(tmp_path, state(1), keep=3)
    newest = save_state(tmp_path, state(2), keep=3)
    data = newest.read_bytes()
    places = np.linspace(0, len(data) - 1, 60).astype(int)
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1
        newest.write_bytes(flipped)
        loaded, warnings = load_state(tmp_path)
        assert_bit_equal(loaded, state(1))
        assert len(warnings) == 1, place
        assert "Falling back to the checkpoint before" in warnings[0]
    newest.write_bytes(data)
    assert_bit_equal(load_state(tmp_path)[0], state(2))


def test_flipped_value_is_called_damage(tmp_path):
    save_state(tmp_path, state(1), keep=2)
    path = tmp_path / "round-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)
    with pytest.raises(FederationError, match=r"damaged: its content has changed .* SHA-256"):
        load_params(path)


def test_foreign_files_are_not_checkpoints(tmp_path):
    (tmp_path / "round-best.safetensors").write_bytes(b"not one")
    (tmp_path / "round-00009.safetensors").write_bytes(b"not one either")
    with pytest.raises(FederationError, match="no readable checkpoint"):
        load_state(tmp_path)
    with pytest.raises(FederationError, match="no readable checkpoint"):
        load_state(tmp_path / "missing")
    save_state(tmp_path, state(3), keep=2)
    assert load_state(tmp_path)[0].round == 3


def test_what_a_killed_server_left_is_removed(tmp_path):
    save_state(tmp_path, state(1), keep=2)
    unfinished = tmp_path / ".round-00002.safetensors.abcd1234"
    unfinished.write_bytes(b"half a state")
    assert load_state(tmp_path)[0].round == 1
    assert not unfinished.exists()


def test_full_disk_is_a_clear_error_and_leaves_no_partial_file(tmp_path, monkeypatch):
    save_state(tmp_path, state(1), keep=2)

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FederationError, match=r"cannot write .*round-00002.*No space left"):
        save_state(tmp_path, state(2), keep=1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["round-00001.safetensors"]
    assert_bit_equal(load_state(tmp_path)[0], state(1))


def test_unwritable_place_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FederationError, match=r"cannot write .*file/x: "):
        write_atomically(tmp_path / "file" / "x", b"data")


def test_a_failed_replacement_keeps_the_old_content(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_atomically(target, b"old")
    monkeypatch.setattr(os, "replace", _refuse)
    monkeypatch.setattr(os, "rename", _refuse)
    with pytest.raises(FederationError, match="cannot write"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def _refuse(*_args, **_keywords):
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_written_files_keep_to_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
