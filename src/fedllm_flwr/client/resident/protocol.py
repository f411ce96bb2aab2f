"""Messages between a ClientApp and the resident trainer over a socket: JSON and raw tensors.

A frame consists of a length (8 bytes, big-endian), a JSON header, and the tensors' bytes in the
header's order. Nothing in it is executed: no pickle, no code.
"""

import json
import socket
import struct
from base64 import b64decode, b64encode
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedllm_flwr.errors import FederationError

_LENGTH = struct.Struct(">Q")
_LARGEST_HEADER = 64 * 2**20  # bytes
_PART = 2**20  # bytes read at a time
_RECORDS: dict[str, type[ConfigRecord] | type[MetricRecord]] = {
    "config": ConfigRecord,
    "metric": MetricRecord,
}


def send_frame(connection: socket.socket, fields: dict[str, Any], content: RecordDict) -> None:
    """Send plain data and records.

    Raises:
        OSError: the peer has closed the connection.
    """
    arrays: list[list[Any]] = []
    buffers: list[bytes] = []
    for record_name, record in content.array_records.items():
        for name, array in record.items():
            arrays.append([record_name, name, array.dtype, list(array.shape), array.stype])
            buffers.append(array.data)
    for entry, buffer in zip(arrays, buffers, strict=True):
        entry.append(len(buffer))
    header = {
        "fields": fields,
        "arrays": arrays,
        "empty": [name for name, record in content.array_records.items() if not record],
        "config": {
            name: {key: value for key, value in record.items() if not isinstance(value, bytes)}
            for name, record in content.config_records.items()
        },
        "bytes": {
            name: {k: b64encode(v).decode() for k, v in record.items() if isinstance(v, bytes)}
            for name, record in content.config_records.items()
        },
        "metric": {name: dict(record) for name, record in content.metric_records.items()},
    }
    text = json.dumps(header).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)
    for buffer in buffers:
        connection.sendall(buffer)


def receive_frame(connection: socket.socket) -> tuple[dict[str, Any], RecordDict]:
    """The plain data and the records of the next frame.

    Raises:
        EOFError: the peer has closed the connection.
        FederationError: the peer's data are not a frame.
    """
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    if length > _LARGEST_HEADER:
        raise FederationError(f"a header of {length} bytes is no message of this package")
    try:
        header = json.loads(_receive(connection, length))
        content = RecordDict()
        for name in header["empty"]:
            content[name] = ArrayRecord()
        arrays: dict[str, dict[str, Array]] = {}
        for record_name, name, dtype, shape, stype, size in header["arrays"]:
            if type(size) is not int or size < 0:
                raise ValueError(f"a tensor of {size} bytes")
            data = _receive(connection, size)
            array = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=data)
            arrays.setdefault(record_name, {})[name] = array
        for record_name, named in arrays.items():
            content[record_name] = ArrayRecord(named)
        for name, texts in header.get("bytes", {}).items():
            header["config"][name] |= {key: b64decode(text) for key, text in texts.items()}
        for kind, make in _RECORDS.items():
            for name, values in header[kind].items():
                content[name] = make(values)
        fields = header["fields"]
        if not isinstance(fields, dict):
            raise TypeError("its fields are no object")
        return fields, content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FederationError(f"not a message of this package ({error})") from error


def _receive(connection: socket.socket, size: int) -> bytes:
    """Receive `size` bytes; memory grows only with the bytes received, not with those announced."""
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), _PART))
        if not part:
            raise EOFError("the connection was closed")
        data += part
    return bytes(data)
