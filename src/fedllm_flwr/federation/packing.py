"""All tensors of a group as one Flower array: their values, then their layout in JSON.

Flower transfers each array by requests of its own, which a SuperLink answers one after another.
With one array for a group, an adapter of hundreds of tensors takes as many requests as one of two.
"""

import io
import json
import math
import struct
from collections.abc import Iterable

import numpy as np
from flwr.app import Array as WireArray
from numpy.typing import NDArray

from fedllm_flwr.errors import FederationError
from fedllm_flwr.params import Params

_FORMAT = "fedllm.tensors"  # in place of Flower's name of NumPy's format
_LENGTH = struct.Struct("<Q")  # of the layout; the last bytes
_DTYPES = {np.dtype(name).str: np.dtype(name) for name in ("<f4", "<f2", "<i2", "|u1")}
_ENTRY = 128  # bytes of the layout at most for one tensor, without its name and shape


def pack(tensors: Iterable[tuple[str, NDArray[np.generic]]]) -> WireArray:
    """Named tensors of float32, float16, int16 or uint8 as one array; holds one of them at a time.

    Args:
        tensors: names and values, in any order in memory.
    """
    values, layout = io.BytesIO(), []
    for name, value in tensors:
        layout.append([name, value.dtype.str, value.shape])
        values.write(np.ascontiguousarray(value).data)
    text = json.dumps(layout).encode()
    values.write(text + _LENGTH.pack(len(text)))
    data = values.getvalue()
    return WireArray(dtype="uint8", shape=(len(data),), stype=_FORMAT, data=data)


def unpack(array: WireArray) -> dict[str, NDArray[np.generic]]:
    """The tensors in their order, as read-only views of the array's bytes.

    Raises:
        FederationError: the array was not made by `pack`.
        ValueError, TypeError, struct.error: likewise.
    """
    if array.stype != _FORMAT:
        raise FederationError(f"its tensors are of the format {array.stype[:100]!r}")
    data = memoryview(array.data)
    (length,) = _LENGTH.unpack(data[-_LENGTH.size :])
    if (end := len(data) - _LENGTH.size - length) < 0:
        raise FederationError("its layout is longer than itself")
    values, text = data[:end], data[end : -_LENGTH.size]
    tensors: dict[str, NDArray[np.generic]] = {}
    start = 0
    for name, code, shape in json.loads(bytes(text)):
        if code not in _DTYPES:
            raise FederationError(f"{name[:100]!r} has dtype {str(code)[:100]!r}")
        dtype = _DTYPES[code]
        end = start + math.prod(shape) * dtype.itemsize
        if name in tensors or not start <= end <= len(values):
            raise FederationError(f"{name[:100]!r} does not fit its layout")
        tensors[name] = np.frombuffer(values[start:end], dtype).reshape(shape)
        start = end
    if start != len(values):
        raise FederationError("it has more values than its layout")
    return tensors


def most_bytes(params: Params) -> int:
    """Upper bound of the bytes that tensors of these names and shapes take, in any dtype."""
    each = (
        _ENTRY + len(json.dumps([name, value.shape])) + 4 * value.size
        for name, value in params.items()
    )
    return _LENGTH.size + _ENTRY + sum(each)
