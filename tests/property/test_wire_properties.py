"""What travels arrives: bfloat16 as torch rounds it, packing and unpacking as inverses."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedllm_flwr.config.compose import compose
from fedllm_flwr.federation.messages import Acknowledged, Assignment, ClientInfo, Failure, Update
from fedllm_flwr.federation.updates.cast import from_bfloat16_bits, round_trip, to_bfloat16_bits
from fedllm_flwr.federation.wire import (
    pack_assignment,
    pack_failure,
    pack_info,
    pack_params,
    pack_query,
    pack_update,
    unpack_assignment,
    unpack_failure,
    unpack_info,
    unpack_params,
    unpack_query,
    unpack_update,
)
from fedllm_flwr.params import Params

DTYPES = ("float32", "bfloat16", "float16")
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONFIGS = {dtype: compose([f"communication={dtype}"]) for dtype in DTYPES}

small = st.floats(-60000, 60000, width=32)  # within float16
any_bits = arrays(
    np.uint32, array_shapes(max_dims=3, max_side=5), elements=st.integers(0, 2**32 - 1)
)


def tensors(elements: st.SearchStrategy[float]) -> st.SearchStrategy[Params]:
    shapes = array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    tensor = arrays(np.float32, shapes, elements=elements)
    return st.dictionaries(st.text(min_size=1, max_size=8), tensor, max_size=4)


def assert_same_bits(actual: Params, expected: Params) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == np.float32
        assert actual[name].shape == value.shape
        assert actual[name].tobytes() == value.tobytes()


def through_torch(params: Params, dtype: str) -> Params:
    """The rounding of `dtype` by an independent implementation."""
    return {
        name: torch.tensor(value).to(TORCH[dtype]).to(torch.float32).numpy()
        for name, value in params.items()
    }


@given(any_bits)
def test_bfloat16_equals_torch_for_every_pattern_of_bits(bits: np.ndarray) -> None:
    """Subnormals, zeros of both signs, halfway cases, overflow to Inf, Inf, NaN."""
    values = bits.view(np.float32)

    encoded = to_bfloat16_bits(values)
    expected = torch.tensor(values).to(torch.bfloat16)

    numbers = ~np.isnan(values)
    assert encoded.dtype == np.int16
    assert (encoded[numbers] == expected.view(torch.int16).numpy()[numbers]).all()
    assert np.isnan(from_bfloat16_bits(encoded)[~numbers]).all()
    decoded = expected.to(torch.float32).numpy()
    assert from_bfloat16_bits(encoded)[numbers].tobytes() == decoded[numbers].tobytes()


def test_every_bfloat16_survives() -> None:
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(np.int16)
    values = from_bfloat16_bits(bits)

    numbers = ~np.isnan(values)
    assert (to_bfloat16_bits(values)[numbers] == bits[numbers]).all()


@given(tensors(st.floats(width=32)))
def test_float32_arrives_bit_for_bit(params: Params) -> None:
    assert_same_bits(unpack_params(pack_params(params, "float32"), "float32"), params)
    assert_same_bits(round_trip(params, "float32"), params)


@given(tensors(small), st.sampled_from(["bfloat16", "float16"]))
def test_short_dtypes_arrive_as_torch_rounds_them_and_only_once(params: Params, dtype: str) -> None:
    arrived = unpack_params(pack_params(params, dtype), dtype)

    assert_same_bits(arrived, through_torch(params, dtype))
    assert_same_bits(round_trip(params, dtype), arrived)
    assert_same_bits(round_trip(arrived, dtype), arrived)


@given(tensors(small))
def test_transposed_and_double_tensors_arrive_as_float32(params: Params) -> None:
    odd = {name: np.array(value, np.float64, order="F") for name, value in params.items()}

    for dtype in DTYPES:
        assert_same_bits(unpack_params(pack_params(odd, dtype), dtype), round_trip(params, dtype))


@settings(max_examples=30)
@given(
    params=tensors(small),
    control=st.none() | tensors(small),
    server_round=st.integers(0, 2**31),
    learning_rate=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
)
def test_task_arrives(
    params: Params,
    control: Params | None,
    server_round: int,
    learning_rate: float,
    dtype: str,
) -> None:
    groups = {} if control is None else {"control": control}
    acknowledged = Acknowledged(server_round - server_round // 3, server_round // 2)
    task = Assignment(
        *(server_round, params, learning_rate, CONFIGS[dtype], groups),
        acknowledged=acknowledged,
        oldest_checkpoint=server_round // 4,
    )

    arrived = unpack_assignment(pack_assignment(task))

    assert_same_bits(arrived.params, round_trip(params, dtype))
    assert arrived.sent.keys() == groups.keys()
    if control is not None:
        assert_same_bits(arrived.sent["control"], round_trip(control, dtype))
    assert (arrived.round, arrived.learning_rate) == (server_round, learning_rate)
    assert arrived.acknowledged == acknowledged
    assert arrived.oldest_checkpoint == server_round // 4
    assert arrived.config == CONFIGS[dtype]


@settings(max_examples=30)
@given(
    delta=tensors(small),
    control=st.none() | tensors(small),
    num_examples=st.integers(-(2**62), 2**62),
    metrics=st.dictionaries(st.text(min_size=1, max_size=8), st.floats(allow_nan=False)),
    lost=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_update_arrives(
    delta: Params,
    control: Params | None,
    num_examples: int,
    metrics: dict[str, float],
    lost: bool,
    dtype: str,
) -> None:
    groups = {} if control is None else {"control_delta": control}
    sent = Update(delta, num_examples, metrics, groups, lost)
    arrived = unpack_update(pack_update(sent, dtype))

    assert_same_bits(arrived.delta, round_trip(delta, dtype))
    assert arrived.contributed.keys() == groups.keys()
    if control is not None:
        assert_same_bits(arrived.contributed["control_delta"], round_trip(control, dtype))
    assert (arrived.num_examples, arrived.metrics) == (num_examples, metrics)
    assert arrived.lost is lost


@given(st.text(), st.integers(0, 2**62), st.text())
def test_small_messages_arrive(name: str, count: int, text: str) -> None:
    info, failure = ClientInfo(name, count, text), Failure(name, text)

    assert unpack_info(pack_info(info)) == info
    assert unpack_failure(pack_failure(failure)) == failure
    assert unpack_failure(pack_info(info)) is None
    assert unpack_query(pack_query(CONFIGS["float32"])) == CONFIGS["float32"]
