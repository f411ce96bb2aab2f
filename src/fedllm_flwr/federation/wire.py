"""Dataclasses to Flower's `RecordDict` and back; the only module that knows the encoding.

Tensors travel under their PEFT names in float32, bfloat16 or float16. Flower's arrays know no
bfloat16, so its bits travel as int16 next to the name of the dtype, and are decoded before any
arithmetic. The configuration travels as JSON data and is typed again on arrival. Whatever a peer
sends, reading it gives the dataclass or a `FederationError`.
"""

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import Array as WireArray
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.config.parsing import from_dict
from fedllm_flwr.errors import ConfigError, FederationError
from fedllm_flwr.federation.encoding import STORED, decode, encode
from fedllm_flwr.federation.messages import (
    Acknowledged,
    ClientInfo,
    Failure,
    Task,
    Update,
    require_version,
)
from fedllm_flwr.params import Params
from fedllm_flwr.training.local_terms import LocalCorrection

WIRE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Keys that name something on the server's disk or network; a client never learns them.
_SERVER_ONLY = (
    *("output_dir", "resume", "init_adapter", "dpo.reference_adapter", "tracking", "compare"),
    *("federation.ray_address", "evaluation.suites", "evaluation.data_root"),
)
_KINDS: dict[type, str] = {int: "whole number", float: "number", bool: "truth value", str: "text"}
_LONGEST_SHOWN = 100  # characters of a peer's wording

_Value = TypeVar("_Value", int, float, bool, str)


@contextmanager
def _reading() -> Iterator[None]:
    """A peer can send any bytes, so any error while reading them is a `FederationError`.

    Its text may go back to the peer: it quotes nothing but the peer's own message.
    """
    try:
        yield
    except FederationError as error:
        error.shareable = str(error)
        raise
    except ConfigError as error:
        text = f"the server's configuration: {error} Do both run the same fedllm-flwr?"
        raise FederationError(text, text) from error
    except Exception as error:
        text = f"it cannot be read ({type(error).__name__}: {_shown(str(error))})"
        raise FederationError(text, text) from error


def pack_params(params: Params, dtype: str) -> tuple[ArrayRecord, str]:
    """Tensors in wire dtype, and that dtype.

    Raises:
        FederationError: a finite value is beyond float16.
    """
    arrays = {name: WireArray(encode(name, values, dtype)) for name, values in params.items()}
    return ArrayRecord(arrays), dtype


@_reading()
def unpack_params(record: ArrayRecord, dtype: str) -> Params:
    """Tensors as float32.

    Raises:
        FederationError: unknown wire dtype, or an array of another dtype than announced.
    """
    if dtype not in STORED:
        raise FederationError(f"unknown wire dtype '{_shown(dtype)}'; use {', '.join(STORED)}")
    params: Params = {}
    for name, array in record.items():
        values = array.numpy()
        if not isinstance(values, np.ndarray) or values.dtype != STORED[dtype]:
            found = getattr(values, "dtype", type(values).__name__)
            raise FederationError(f"'{_shown(name)}' has dtype {found}, announced as {dtype}")
        params[name] = decode(values, dtype)
    return params


def round_trip(params: Params, dtype: str) -> Params:
    """`params` as they look after travelling; tensors may share memory with the given ones."""
    return {name: decode(encode(name, values, dtype), dtype) for name, values in params.items()}


def wire_bytes(params: Params, dtype: str) -> int:
    """Bytes of tensor data that `params` take on the wire."""
    return sum(int(v.size) for v in params.values()) * WIRE_BYTES[dtype]


def pack_task(task: Task) -> RecordDict:
    """A `Task` as records."""
    (content,) = pack_tasks(task, [task.acknowledged])
    return content


def pack_tasks(task: Task, clients: Iterable[Acknowledged]) -> Iterator[RecordDict]:
    """The same `Task` for several clients; their contents share all records but one small one."""
    dtype = task.config.communication.dtype
    arrays, _ = pack_params(task.params, dtype)
    settings = ConfigRecord(
        {
            "round": task.round,
            "learning_rate": task.learning_rate,
            "dtype": dtype,
            "mu": task.correction.mu,
            "control_variates": task.correction.control_variates,
            "as_openfedllm": task.correction.as_openfedllm,
            "alone": task.alone,
            "run": task.run,
            "oldest_checkpoint": task.oldest_checkpoint,
            "config": _config_text(task.config),
        }
    )
    shared = RecordDict({"params": arrays, "task": settings})
    for name in ("control", "reference"):
        if (params := getattr(task, name)) is not None:
            shared[name], _ = pack_params(params, dtype)
    for acknowledged in clients:
        own = ConfigRecord({"round": acknowledged.round, "updates": acknowledged.updates})
        yield RecordDict({**shared, "acknowledged": own})


@_reading()
def unpack_task(content: RecordDict) -> Task:
    """The `Task` in a server's message.

    Raises:
        FederationError: it lacks a record or a field, or holds one that makes no sense.
    """
    settings = _settings(content, "task")
    dtype = _field(settings, "dtype", str)
    correction = LocalCorrection(
        mu=_non_negative(settings, "mu"),
        control_variates=_field(settings, "control_variates", bool),
        as_openfedllm=_field(settings, "as_openfedllm", bool),
    )
    control = content.array_records.get("control")
    if correction.control_variates and control is None:
        raise FederationError("it lacks 'control', the control variate that it asks for")
    reference = content.array_records.get("reference")
    if (server_round := _field(settings, "round", int)) < 0:
        raise FederationError(f"round={server_round} is below 0")
    own = _settings(content, "acknowledged")
    acknowledged = Acknowledged(_field(own, "round", int), _field(own, "updates", int))
    if not 0 <= acknowledged.updates <= acknowledged.round <= server_round:
        raise FederationError(f"{acknowledged} is not of round {server_round}")
    return Task(
        round=server_round,
        params=unpack_params(_arrays(content, "params"), dtype),
        learning_rate=_non_negative(settings, "learning_rate"),
        config=_config(settings),
        correction=correction,
        control=None if control is None else unpack_params(control, dtype),
        alone=_field(settings, "alone", bool),
        run=_field(settings, "run", str),
        acknowledged=acknowledged,
        oldest_checkpoint=_field(settings, "oldest_checkpoint", int),
        reference=None if reference is None else unpack_params(reference, dtype),
    )


def pack_update(update: Update, dtype: str) -> RecordDict:
    """An `Update` as records."""
    arrays, _ = pack_params(update.delta, dtype)
    content = RecordDict(
        {
            "delta": arrays,
            "update": ConfigRecord(
                {"dtype": dtype, "num_examples": update.num_examples, "lost": update.lost}
            ),
            "metrics": MetricRecord(dict(update.metrics)),
        }
    )
    if update.control_delta is not None:
        content["control_delta"], _ = pack_params(update.control_delta, dtype)
    return content


@_reading()
def unpack_update(content: RecordDict) -> Update:
    """The `Update` in a client's reply.

    Raises:
        FederationError: the reply lacks a record or a field, or holds one of a wrong type.
    """
    settings = _settings(content, "update")
    dtype = _field(settings, "dtype", str)
    metrics = content.metric_records.get("metrics")
    if metrics is None:
        raise FederationError("it lacks 'metrics'")
    control = content.array_records.get("control_delta")
    return Update(
        num_examples=_field(settings, "num_examples", int),
        delta=unpack_params(_arrays(content, "delta"), dtype),
        metrics={name: float(cast(float, value)) for name, value in metrics.items()},
        control_delta=None if control is None else unpack_params(control, dtype),
        lost=_field(settings, "lost", bool),
    )


def pack_query(config: Config) -> RecordDict:
    """The question every node is asked once: who are you, and how much data do you hold."""
    question = ConfigRecord({"version": __version__, "config": _config_text(config)})
    return RecordDict({"query": question})


@_reading()
def unpack_query(content: RecordDict) -> Config:
    """The configuration in a query of a server of this version."""
    question = _settings(content, "query")
    require_version(_shown(_field(question, "version", str)))
    return _config(question)


@_reading()
def unpack_config(content: RecordDict) -> tuple[int, Config]:
    """Round and configuration of a task, or of a query, which is round 0; without its tensors.

    Raises:
        FederationError: it is neither.
    """
    if (settings := content.config_records.get("task")) is not None:
        return _field(settings, "round", int), _config(settings)
    return 0, _config(_settings(content, "query"))


def pack_info(info: ClientInfo) -> RecordDict:
    """A `ClientInfo` as records."""
    return RecordDict({"info": ConfigRecord(cast(Mapping[str, Any], asdict(info)))})  # type: ignore[arg-type]


@_reading()
def unpack_info(content: RecordDict) -> ClientInfo:
    """The `ClientInfo` in a reply."""
    record = _settings(content, "info")
    return ClientInfo(
        name=_field(record, "name", str),
        num_examples=_field(record, "num_examples", int),
        version=_field(record, "version", str),
        model=_field(record, "model", str),
    )


def pack_failure(failure: Failure) -> RecordDict:
    """A `Failure` as records."""
    return RecordDict({"failure": ConfigRecord(cast(Mapping[str, Any], asdict(failure)))})  # type: ignore[arg-type]


@_reading()
def unpack_failure(content: RecordDict) -> Failure | None:
    """The `Failure` in a reply, or None if the reply is none."""
    if "failure" not in content:
        return None
    record = _settings(content, "failure")
    return Failure(
        kind=_field(record, "kind", str),
        reason=_field(record, "reason", str),
        client=_field(record, "client", str),
    )


def pack_scores(scores: Mapping[str, float], num_examples: int) -> RecordDict:
    """A client's scores of the global adapter, and the number of examples behind them."""
    return RecordDict({"metrics": MetricRecord({**scores, "num_examples": num_examples})})


def _config_text(config: Config) -> str:
    """What clients learn of the configuration, as JSON."""
    sections = asdict(config)
    for key in _SERVER_ONLY:
        *path, leaf = key.split(".")
        del functools.reduce(lambda inner, name: inner[name], path, sections)[leaf]
    return json.dumps(sections)


def _config(settings: ConfigRecord) -> Config:
    return from_dict(json.loads(_field(settings, "config", str)))


def _settings(content: RecordDict, name: str) -> ConfigRecord:
    record = content.config_records.get(name)
    if record is None:
        raise FederationError(f"it lacks {name!r}")
    return record


def _arrays(content: RecordDict, name: str) -> ArrayRecord:
    record = content.array_records.get(name)
    if record is None:
        raise FederationError(f"it lacks {name!r}")
    return record


def _field(record: ConfigRecord, name: str, kind: type[_Value]) -> _Value:
    if name not in record:
        raise FederationError(f"it lacks {name!r}")
    value = record[name]
    if type(value) is not kind:  # not isinstance: a truth value is no number
        raise FederationError(f"{name}={_shown(repr(value))} is no {_KINDS[kind]}")
    return value


def _non_negative(record: ConfigRecord, name: str) -> float:
    value = _field(record, name, float)
    if not (math.isfinite(value) and value >= 0):
        raise FederationError(f"{name}={value} is not finite and >= 0")
    return value


def _shown(text: str) -> str:
    """A peer's wording, bounded and on one line."""
    cut = text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
    return cut if cut.isprintable() else repr(cut)[1:-1]
