"""All tensors of a group as one Flower array: a layout in JSON, then the values.

Flower transfers each array by requests of its own, which a SuperLink answers one after another.
With one array for a group, an adapter of hundreds of tensors takes as many requests as one of two.
"""

import json
import math
import struct
from collections.abc import Mapping

import numpy as np
from flwr.app import Array as WireArray
from numpy.typing import NDArray

from fedllm_flwr.errors import FederationError
from fedllm_flwr.params import Params

_FORMAT = "fedllm.tensors"  # in place of Flower's name of NumPy's format
_LENGTH = struct.Struct("<Q")  # of the layout
_ALIGNED = 8  # bytes; the values start at a multiple of them
_DTYPES = {np.dtype(name).str: np.dtype(name) for name in ("<f4", "<f2", "<i2", "|u1")}
_ENTRY = 128  # bytes of the layout at most for one tensor, without its name and shape


def pack(tensors: Mapping[str, NDArray[np.generic]]) -> WireArray:
    """Tensors of float32, float16, int16 or uint8, of any layout in memory, as one array."""
    entries = [[name, value.dtype.str, value.shape] for name, value in tensors.items()]
    layout = json.dumps(entries).encode()
    layout += b" " * (-len(layout) % _ALIGNED)
    values = [np.ascontiguousarray(value).data for value in tensors.values()]
    data = b"".join([_LENGTH.pack(len(layout)), layout, *values])
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
    start = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    tensors: dict[str, NDArray[np.generic]] = {}
    for name, code, shape in json.loads(bytes(data[_LENGTH.size : start])):
        if code not in _DTYPES:
            raise FederationError(f"{name[:100]!r} has dtype {str(code)[:100]!r}")
        dtype = _DTYPES[code]
        end = start + math.prod(shape) * dtype.itemsize
        if name in tensors or not start <= end <= len(data):
            raise FederationError(f"{name[:100]!r} does not fit its layout")
        tensors[name] = np.frombuffer(data[start:end], dtype).reshape(shape)
        start = end
    if start != len(data):
        raise FederationError("it has more values than its layout")
    return tensors


def most_bytes(params: Params) -> int:
    """Upper bound of the bytes that tensors of these names and shapes take, in any dtype."""
    return (
        _LENGTH.size
        + _ALIGNED
        + sum(
            _ENTRY + len(json.dumps([name, value.shape])) + 4 * value.size
            for name, value in params.items()
        )
    )
