"""Compression of updates: bounds, no bias, error feedback, and what no honest client sends."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedllm_flwr.config.compose import compose
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.updates.compress import BLOCK, RESIDUAL, Compression, Int4, Int8, TopK
from fedllm_flwr.federation.updates.transform import Chain, Passage
from fedllm_flwr.params import add, check_like, full_like

NAMES = ("int8", "int4", "top_k")
VALUES = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 3 * BLOCK)),
    elements=st.floats(-1e4, 1e4, width=32),
)


def made(name: str, *overrides: str) -> Compression:
    config = compose([f"communication.transforms=[{name}]", *overrides])
    (link,) = Chain.of(config).links
    assert isinstance(link, Compression)
    return link


COMPRESSIONS = {name: made(name) for name in NAMES}


def travelled(link: Compression, values: np.ndarray[Any, Any], number: int = 1) -> Any:
    groups, passage = {"delta": {"w": values}}, Passage("a", number, 7)
    return link.server_end(link.client_end(groups, passage), groups, passage)["delta"]["w"]


@given(VALUES, st.sampled_from(("int8", "int4")))
def test_whole_numbers_are_off_by_less_than_a_step(values: np.ndarray[Any, Any], name: str) -> None:
    link = COMPRESSIONS[name]
    assert isinstance(link, Int8)
    error = np.abs(travelled(link, values).astype(np.float64) - values).ravel()
    for start in range(0, values.size, BLOCK):
        largest = np.abs(values.ravel()[start : start + BLOCK]).max()
        assert error[start : start + BLOCK].max() <= largest / link.levels * (1 + 1e-5) + 1e-38


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_rounding_has_no_bias(name: str) -> None:
    link = COMPRESSIONS[name]
    assert isinstance(link, Int8)
    values, times = np.random.default_rng(0).normal(size=(1, BLOCK)).astype(np.float32), 2000
    sent = np.stack([travelled(link, values, number) for number in range(times)], dtype=float)
    step = np.abs(values).max() / link.levels
    assert (np.abs(sent.mean(axis=0) - values) <= 5 * step / 2 / times**0.5).all()
    assert (sent.std(axis=0) > 0).mean() > 0.9


@given(VALUES, st.floats(0.01, 1))
def test_the_largest_values_travel_exactly(values: np.ndarray[Any, Any], share: float) -> None:
    link = made("top_k", f"communication.top_k={share}")
    assert isinstance(link, TopK)
    sent = travelled(link, values).ravel()
    kept = link.kept(values.size)
    assert np.count_nonzero(sent) <= kept
    smallest = np.sort(np.abs(values.ravel()))[-kept]
    larger = np.abs(values.ravel()) > smallest
    np.testing.assert_array_equal(sent[larger], values.ravel()[larger])
    assert (sent[~larger] == values.ravel()[~larger]).sum() >= kept - larger.sum()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_out_comes_with_later_updates(name: str) -> None:
    chain = Chain.of(compose([f"communication.transforms=[{name}]"]))
    rng = np.random.default_rng(1)
    shapes = {"a": (40, 8), "b": (8, 70)}
    deltas = [
        {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} for _ in "12345"
    ]
    memory: Any = {}
    arrived = full_like(deltas[0], 0.0)
    for number, delta in enumerate(deltas):
        own = {n: v for n, v in delta.items() if number != 2 or n == "b"}  # "a" rests in one round
        passage = Passage("x", number, 0, memory)
        sent, memory = chain.client_end({"delta": own}, passage)
        wire = {group: chain.as_received(params) for group, params in sent.items()}
        received = chain.server_end(wire, {"delta": own}, Passage("x", number, 0))["delta"]
        check_like(received, own)
        arrived = {n: v + received[n] if n in own else v for n, v in arrived.items()}
    wanted = full_like(deltas[0], 0.0)
    for number, delta in enumerate(deltas):
        wanted = {n: v + (delta[n] if number != 2 or n == "b" else 0) for n, v in wanted.items()}
    for n, value in add(arrived, memory[RESIDUAL]).items():
        np.testing.assert_allclose(value, wanted[n], atol=1e-5)


@given(st.sampled_from(NAMES), st.binary(max_size=600), st.integers(1, 300))
def test_any_bytes_are_read_or_refused(name: str, sent: bytes, size: int) -> None:
    link, like = COMPRESSIONS[name], {"delta": {"w": np.zeros(size, np.float32)}}
    for length in (len(sent), link.num_bytes(size)):
        encoded = np.resize(np.frombuffer(sent or b"\0", np.uint8), length)
        try:
            found = link.server_end({"delta": {"w": encoded}}, like, Passage("a", 1, 0))
        except FederationError:
            continue
        assert found["delta"]["w"].shape == (size,)
    for foreign in ({"delta": {"v": encoded}}, {"extra": {"w": encoded}}):
        with pytest.raises(FederationError, match="is not a tensor of this adapter"):
            link.server_end(foreign, like, Passage("a", 1, 0))


def test_bytes_of_an_adapter() -> None:
    """Mistral-7B, rank 32 on q and v of 32 layers: 13.6 million values."""
    shapes = [(32, 4096), (4096, 32), (32, 4096), (1024, 32)] * 32
    adapter = {str(n): np.broadcast_to(np.float32(0), shape) for n, shape in enumerate(shapes)}
    found = {
        name: sum(v.size for v in link.expected({"delta": adapter})["delta"].values()) / 1e6
        for name, link in COMPRESSIONS.items()
    }
    assert found == pytest.approx({"int8": 14.06, "int4": 7.24, "top_k": 5.45}, abs=0.01)
    assert Int4.levels == 7
