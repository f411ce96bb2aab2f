"""The cast to the dtype of the wire and back, the last link of every chain. NumPy only.

Bytes (uint8), to which a transform has encoded a tensor, are sent unchanged.

NumPy and Flower do not support bfloat16, so its bits are stored as int16, and decoded before any
arithmetic.
"""

from typing import cast

import numpy as np

from fedllm_flwr.errors import FederationError
from fedllm_flwr.params import Array, Params

STORED = {"float32": np.float32, "bfloat16": np.int16, "float16": np.float16}
"""NumPy dtype in which each wire dtype is stored."""
WIRE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def to_bfloat16_bits(values: Array) -> Array:
    """float32 to bfloat16 bits as int16, rounded to nearest even; NaN stays NaN."""
    bits = np.asarray(values, dtype=np.float32, order="C").view(np.uint32)
    half, shift = np.uint32(0x7FFF), np.uint32(16)
    with np.errstate(over="ignore"):  # a NaN whose bits wrap around, replaced below
        rounded = (bits + half + ((bits >> shift) & np.uint32(1))) >> shift
    result = np.where(np.isnan(values), np.uint32(0x7FC0), rounded)
    return cast(Array, result.astype(np.uint16).view(np.int16))


def from_bfloat16_bits(bits: Array) -> Array:
    """bfloat16 bits in int16 to float32."""
    widened = np.asarray(bits.view(np.uint16).astype(np.uint32) << np.uint32(16))
    return cast(Array, widened.view(np.float32))


def encode(name: str, values: Array, dtype: str) -> Array:
    """`values` in wire dtype. Inf and NaN pass, so that the receiver can reject them by name.

    Raises:
        FederationError: a finite value is too large for float16.
    """
    if values.dtype == np.uint8:  # what a transform has compressed
        return values
    if dtype == "bfloat16":
        return to_bfloat16_bits(values)
    with np.errstate(over="ignore"):
        encoded = np.asarray(values, dtype=STORED[dtype], order="C")
    if dtype == "float16" and (np.isinf(encoded) & np.isfinite(values)).any():
        text = f"{name!r} holds a value beyond communication.dtype=float16 (65504); use bfloat16"
        raise FederationError(text, text)
    return encoded


def decode(values: Array, dtype: str) -> Array:
    """Wire dtype to float32, without a copy if nothing changes; bytes are returned unchanged."""
    if values.dtype == np.uint8:
        return values
    if dtype == "bfloat16":
        return from_bfloat16_bits(values)
    return values.astype(np.float32, copy=False)


def round_trip(params: Params, dtype: str) -> Params:
    """`params` after encoding and decoding; tensors may share memory with the given ones."""
    return {name: decode(encode(name, values, dtype), dtype) for name, values in params.items()}


def wire_bytes(params: Params, dtype: str) -> int:
    """Bytes of tensor data of `params` on the wire."""
    return sum(
        int(value.size) * (1 if value.dtype == np.uint8 else WIRE_BYTES[dtype])
        for value in params.values()
    )
