"""Tensors of a group as one array: what arrives, and what is refused."""

import json
import struct
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.packing import most_bytes, pack, unpack

TENSORS = {
    "b.weight": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "a": np.array(2.5, np.float16),
    "codes": np.arange(7, dtype=np.uint8),
    "bits": np.arange(-3, 3, dtype=np.int16),
    "none": np.zeros((0, 3), np.float32),
}


def test_tensors_arrive_in_their_order() -> None:
    arrived = unpack(pack(TENSORS.items()))

    assert list(arrived) == list(TENSORS)
    for name, value in TENSORS.items():
        assert (arrived[name].dtype, arrived[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(arrived[name], value)
    assert unpack(pack(())) == {}


def test_the_bound_holds_for_every_dtype() -> None:
    rng = np.random.default_rng(0)
    params = {
        f"model.layers.{i}.q_proj.lora_A.weight": rng.normal(size=(8, 3 + i)).astype(np.float32)
        for i in range(20)
    }
    for dtype in (np.float32, np.float16, np.int16, np.uint8):
        cast = {name: value.astype(dtype) for name, value in params.items()}
        assert len(pack(cast.items()).data) <= most_bytes(params)
    whole = len(pack(params.items()).data)
    assert whole <= most_bytes(params) <= whole + 200 * len(params)


def made_of(entries: object, values: bytes = b"", length: int | None = None) -> Array:
    layout = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    data = values + layout + struct.pack("<Q", len(layout) if length is None else length)
    return Array("uint8", (len(data),), "fedllm.tensors", data)


A = ["a", "<f4", [2]]
FOUR = b"abcd"
HOSTILE: dict[str, Callable[[], Array]] = {
    "no bytes": lambda: Array("uint8", (0,), "fedllm.tensors", b""),
    "no JSON": lambda: made_of(b"{"),
    "deep JSON": lambda: made_of(b"[" * 10**5),
    "no list": lambda: made_of(7),
    "no entries": lambda: made_of([7]),
    "layout beyond the start": lambda: made_of([A], FOUR * 2, length=2**63),
    "name that is none": lambda: made_of([[["a"], "<f4", [1]]], FOUR),
    "objects": lambda: made_of([["a", "|O", [1]]], FOUR * 2),
    "unhashable dtype": lambda: made_of([["a", ["<f4"], [1]]], FOUR),
    "too few values": lambda: made_of([A], FOUR),
    "too many values": lambda: made_of([A], FOUR * 3),
    "twice": lambda: made_of([A, A], FOUR * 4),
    "negative shape": lambda: made_of([["a", "<f4", [-1]]], FOUR),
    "two negative sides": lambda: made_of([["a", "<f4", [-1, -2]]], FOUR * 2),
    "fractional shape": lambda: made_of([["a", "<f4", [1.0]]], FOUR),
    "huge shape": lambda: made_of([["a", "<f4", [2**70]]], FOUR),
    "huge empty shape": lambda: made_of([["a", "<f4", [2**70, 0]]]),
    "NumPy's format": lambda: Array(np.zeros(2, np.float32)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_pack_has_not_made_is_refused(case: str) -> None:
    with pytest.raises((FederationError, ValueError, TypeError, struct.error, RecursionError)):
        unpack(HOSTILE[case]())
