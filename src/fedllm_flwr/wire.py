"""Dataclasses to Flower's `RecordDict` and back; the only module that knows the encoding.

Tensors travel under their PEFT names in float32, bfloat16 or float16. Flower's arrays know no
bfloat16, so its bits travel as int16 next to the name of the dtype, and are decoded before any
arithmetic. The configuration travels as JSON data and is typed again on arrival.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import numpy as np
from flwr.app import Array as WireArray
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedllm_flwr.config import Config
from fedllm_flwr.config.typed import from_dict
from fedllm_flwr.errors import FederationError
from fedllm_flwr.messages import ClientInfo, Failure, LocalCorrection, Task, Update
from fedllm_flwr.params import Array, Params

_ENCODED = {"float32": np.float32, "bfloat16": np.int16, "float16": np.float16}
WIRE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Keys that name something on the server's disk; a client never learns them.
_SERVER_ONLY = ("output_dir", "resume", "init_adapter", "tracking", "checkpoint")


def to_bfloat16_bits(values: Array) -> Array:
    """float32 to bfloat16 bits as int16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    result = np.where(np.isnan(values), np.uint32(0x7FC0), rounded)
    return cast(Array, result.astype(np.uint16).view(np.int16))


def from_bfloat16_bits(bits: Array) -> Array:
    """bfloat16 bits in int16 to float32."""
    return cast(Array, (bits.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32))


def pack_params(params: Params, dtype: str) -> tuple[ArrayRecord, str]:
    """Tensors in wire dtype, and the JSON list of their names and dtype."""
    encode = to_bfloat16_bits if dtype == "bfloat16" else lambda v: v.astype(_ENCODED[dtype])
    with np.errstate(over="ignore"):
        encoded = {name: WireArray(np.ascontiguousarray(encode(v))) for name, v in params.items()}
    return ArrayRecord(encoded), dtype


def unpack_params(record: ArrayRecord, dtype: str) -> Params:
    """Tensors as float32.

    Raises:
        FederationError: unknown wire dtype, or an array of another dtype than announced.
    """
    if dtype not in _ENCODED:
        raise FederationError(f"unknown wire dtype {dtype!r}; expected {', '.join(_ENCODED)}")
    params: Params = {}
    for name, array in record.items():
        values = array.numpy()
        if values.dtype != _ENCODED[dtype]:
            raise FederationError(f"{name!r} has dtype {values.dtype}, announced as {dtype}")
        decoded = from_bfloat16_bits(values) if dtype == "bfloat16" else values
        params[name] = decoded.astype(np.float32)
    return params


def round_trip(params: Params, dtype: str) -> Params:
    """`params` as they look after travelling."""
    return unpack_params(*pack_params(params, dtype))


def wire_bytes(params: Params, dtype: str) -> int:
    """Bytes of tensor data that `params` take on the wire."""
    return sum(int(v.size) for v in params.values()) * WIRE_BYTES[dtype]


def pack_task(task: Task) -> RecordDict:
    """A `Task` as records; built once and shared by the messages of a round."""
    dtype = task.config.communication.dtype
    arrays, _ = pack_params(task.params, dtype)
    config = {k: v for k, v in asdict(task.config).items() if k not in _SERVER_ONLY}
    settings = ConfigRecord(
        {
            "round": task.round,
            "learning_rate": task.learning_rate,
            "dtype": dtype,
            "mu": task.correction.mu,
            "control_variates": task.correction.control_variates,
            "post_step": task.correction.post_step,
            "config": json.dumps(config),
        }
    )
    content = RecordDict({"params": arrays, "task": settings})
    if task.control is not None:
        content["control"], _ = pack_params(task.control, dtype)
    return content


def unpack_task(content: RecordDict) -> Task:
    """The `Task` in a server's message."""
    settings = content.config_records["task"]
    dtype = cast(str, settings["dtype"])
    control = content.array_records.get("control")
    return Task(
        round=cast(int, settings["round"]),
        params=unpack_params(content.array_records["params"], dtype),
        learning_rate=cast(float, settings["learning_rate"]),
        config=from_dict(json.loads(cast(str, settings["config"]))),
        correction=LocalCorrection(
            mu=cast(float, settings["mu"]),
            control_variates=cast(bool, settings["control_variates"]),
            post_step=cast(bool, settings["post_step"]),
        ),
        control=None if control is None else unpack_params(control, dtype),
    )


def pack_update(update: Update, dtype: str) -> RecordDict:
    """An `Update` as records."""
    arrays, _ = pack_params(update.delta, dtype)
    content = RecordDict(
        {
            "delta": arrays,
            "update": ConfigRecord({"dtype": dtype, "num_examples": update.num_examples}),
            "metrics": MetricRecord(dict(update.metrics)),
        }
    )
    if update.control_delta is not None:
        content["control_delta"], _ = pack_params(update.control_delta, dtype)
    return content


def unpack_update(content: RecordDict) -> Update:
    """The `Update` in a client's reply.

    Raises:
        FederationError: the reply lacks a record or a field, or holds one of a wrong type.
    """
    try:
        settings = content.config_records["update"]
        dtype, num_examples = settings["dtype"], settings["num_examples"]
        record = content.array_records["delta"]
        metrics = content.metric_records["metrics"]
    except KeyError as error:
        raise FederationError(f"the reply lacks {error}") from error
    if not isinstance(num_examples, int) or isinstance(num_examples, bool):
        raise FederationError(f"num_examples={num_examples!r} is no whole number")
    control = content.array_records.get("control_delta")
    return Update(
        delta=unpack_params(record, str(dtype)),
        num_examples=num_examples,
        metrics={k: float(cast(float, v)) for k, v in metrics.items()},
        control_delta=None if control is None else unpack_params(control, str(dtype)),
    )


def pack_query(config: Config) -> RecordDict:
    """The question every node is asked once: who are you, and how much data do you hold."""
    sections = {k: v for k, v in asdict(config).items() if k not in _SERVER_ONLY}
    return RecordDict({"query": ConfigRecord({"config": json.dumps(sections)})})


def unpack_query(content: RecordDict) -> Config:
    """The configuration in a query."""
    text = cast(str, content.config_records["query"]["config"])
    return from_dict(json.loads(text))


def pack_info(info: ClientInfo) -> RecordDict:
    """A `ClientInfo` as records."""
    return RecordDict({"info": ConfigRecord(cast(Mapping[str, Any], asdict(info)))})  # type: ignore[arg-type]


def unpack_info(content: RecordDict) -> ClientInfo:
    """The `ClientInfo` in a reply."""
    record = content.config_records["info"]
    return ClientInfo(
        name=str(record["name"]),
        num_examples=int(cast(int, record["num_examples"])),
        version=str(record["version"]),
    )


def pack_failure(failure: Failure) -> RecordDict:
    """A `Failure` as records."""
    return RecordDict({"failure": ConfigRecord({"kind": failure.kind, "reason": failure.reason})})


def unpack_failure(content: RecordDict) -> Failure | None:
    """The `Failure` in a reply, or None if the reply is none."""
    record = content.config_records.get("failure")
    if record is None:
        return None
    return Failure(kind=str(record["kind"]), reason=str(record["reason"]))


def pack_scores(scores: Mapping[str, float], num_examples: int) -> RecordDict:
    """A client's scores of the global adapter, and the number of examples behind them."""
    return RecordDict({"metrics": MetricRecord({**scores, "num_examples": num_examples})})
