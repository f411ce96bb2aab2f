"""Dataclasses to Flower's `RecordDict` and back; the only module that knows the encoding.

Tensors are sent under their PEFT names in float32, bfloat16 or float16, those of a group as one
array (`packing`). NumPy does not support bfloat16, so its bits are sent as int16 with the name of
the dtype, and decoded before any arithmetic. The configuration is sent as JSON and parsed into its
schema on arrival. Reading any message of a peer gives the dataclass or a `FederationError`.
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
from fedllm_flwr.config.validation import adapter_keys
from fedllm_flwr.errors import ConfigError, FederationError
from fedllm_flwr.federation.masked_round import session_of
from fedllm_flwr.federation.messages import (
    Acknowledged,
    Assignment,
    ClientInfo,
    Download,
    Failure,
    MaskedUpdate,
    Update,
    require_version,
)
from fedllm_flwr.federation.packing import pack, unpack
from fedllm_flwr.federation.secure.fixed_point import signed
from fedllm_flwr.federation.secure.graph import Session
from fedllm_flwr.federation.secure.keys import KeyCard
from fedllm_flwr.federation.secure.site import Opened, Signed, Unmask
from fedllm_flwr.federation.updates.cast import STORED, decode, encode
from fedllm_flwr.params import Params

# Keys that refer to the server's disk or network, and are never sent to clients.
_SERVER_ONLY = (
    *("output_dir", "resume", "tracking", "compare", "federation.ray_address"),
    *("evaluation.suites", "evaluation.data_root"),
)
_TENSORS = "tensors"  # the array of a group
MASKED = "masked"  # used instead of a dtype: words of a ring
_KINDS: dict[type, str] = {
    **{int: "whole number", float: "number", bool: "truth value", str: "text", bytes: "bytes"}
}
_LONGEST_SHOWN = 100  # characters of a peer's wording

_Value = TypeVar("_Value", int, float, bool, str, bytes)


@contextmanager
def _reading() -> Iterator[None]:
    """Turn every error while reading a peer's bytes into a `FederationError`.

    Its text may be sent back to the peer, so it quotes only the peer's own message.
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


def pack_params(params: Params, dtype: str) -> ArrayRecord:
    """Tensors in wire dtype.

    Raises:
        FederationError: a finite value is out of float16's range.
    """
    encoded = ((name, encode(name, values, dtype)) for name, values in params.items())
    return ArrayRecord({_TENSORS: pack(encoded)})


@_reading()
def unpack_params(record: ArrayRecord, dtype: str) -> Params:
    """Tensors as float32; they may be read-only.

    Raises:
        FederationError: unknown wire dtype, or a tensor of another dtype than announced.
    """
    if dtype not in STORED:
        raise FederationError(f"unknown wire dtype '{_shown(dtype)}'; use {', '.join(STORED)}")
    if list(record) != [_TENSORS]:
        found = _shown(str(list(record)))
        raise FederationError(f"its arrays are {found} instead of {[_TENSORS]}")
    params: Params = {}
    for name, values in unpack(record[_TENSORS]).items():
        if values.dtype not in (STORED[dtype], np.uint8):
            raise FederationError(
                f"'{_shown(name)}' has dtype {values.dtype}, announced as {dtype}"
            )
        params[name] = decode(values, dtype)
    return params


def pack_assignment(assignment: Assignment) -> RecordDict:
    """An `Assignment` as records."""
    (content,) = pack_assignments([assignment])
    return content


def pack_assignments(assignments: Iterable[Assignment]) -> Iterator[RecordDict]:
    """Assignments of one round as records; groups shared by several clients are encoded once."""
    encoded: dict[int, tuple[Params, ArrayRecord]] = {}  # by id of the group, which is kept alive
    texts: dict[int, tuple[Config, str]] = {}
    for assignment in assignments:
        config = assignment.config
        dtype = config.communication.dtype
        if id(config) not in texts:
            texts[id(config)] = config, _config_text(config)
        own = assignment.acknowledged
        content = RecordDict(
            {
                "task": ConfigRecord(
                    {
                        "round": assignment.round,
                        "learning_rate": assignment.learning_rate,
                        "dtype": dtype,
                        "run": assignment.run,
                        "oldest_checkpoint": assignment.oldest_checkpoint,
                        "seeded": assignment.seeded,
                        "config": texts[id(config)][1],
                    }
                ),
                "acknowledged": ConfigRecord({"round": own.round, "updates": own.updates}),
            }
        )
        if (session := assignment.session) is not None:
            content["session"] = ConfigRecord(
                {
                    "id": session.id,
                    "weighting": session.weighting,
                    "largest_weight": session.largest_weight,
                }
            )
            content["cards"] = ConfigRecord({n: c.to_text() for n, c in session.cards.items()})
        if (download := assignment.download) is not None:
            content["download"] = ConfigRecord({"digest": download.digest})
        for name, params in assignment.on_wire.items():
            if id(params) not in encoded:
                encoded[id(params)] = params, pack_params(params, dtype)
            content[name] = encoded[id(params)][1]
        yield content


@_reading()
def unpack_assignment(content: RecordDict) -> Assignment:
    """The `Assignment` in a server's message.

    Raises:
        FederationError: a record or a field is missing or invalid.
    """
    settings = _settings(content, "task")
    dtype = _field(settings, "dtype", str)
    if (server_round := _field(settings, "round", int)) < 0:
        raise FederationError(f"round={server_round} is below 0")
    own = _settings(content, "acknowledged")
    acknowledged = Acknowledged(_field(own, "round", int), _field(own, "updates", int))
    if not 0 <= acknowledged.updates <= acknowledged.round <= server_round:
        raise FederationError(f"{acknowledged} is not of round {server_round}")
    groups = {name: unpack_params(record, dtype) for name, record in content.array_records.items()}
    if (download := _download(content, groups)) is None:
        _arrays(content, "params")
    config = _config(settings)
    return Assignment(
        round=server_round,
        params=groups.pop("params", {}),
        learning_rate=_non_negative(settings, "learning_rate"),
        config=config,
        sent=groups,
        run=_field(settings, "run", str),
        acknowledged=acknowledged,
        oldest_checkpoint=_field(settings, "oldest_checkpoint", int),
        seeded=_field(settings, "seeded", str),
        session=_session(content, config),
        download=download,
    )


def _download(content: RecordDict, groups: dict[str, Params]) -> Download | None:
    """The compressed download in a message, whose groups it takes out of `groups`."""
    if "download" not in content.config_records:
        return None
    whole = groups.pop("whole", None)
    steps = tuple(groups.pop(f"step.{number}") for number in range(1, len(groups) + 1))
    return Download(_field(_settings(content, "download"), "digest", str), whole, steps)


def _session(content: RecordDict, config: Config) -> Session | None:
    """The secure-aggregation session in a message, checked against the run's settings."""
    if not config.privacy.secure_aggregation or "session" not in content.config_records:
        return None
    about, cards = _settings(content, "session"), _settings(content, "cards")
    return session_of(
        config.privacy,
        id=_field(about, "id", str),
        cards={name: KeyCard.from_text(_field(cards, name, str)) for name in cards},
        weighting=_field(about, "weighting", str),
        largest_weight=_non_negative(about, "largest_weight"),
    )


def pack_requests(requests: Iterable[Assignment | Unmask]) -> Iterator[RecordDict]:
    """Requests of one exchange as records, in their order."""
    some = list(requests)
    assignments = pack_assignments(each for each in some if isinstance(each, Assignment))
    for each in some:
        yield pack_unmask(each) if isinstance(each, Unmask) else next(assignments)


def pack_unmask(question: Unmask) -> RecordDict:
    """An `Unmask` as records."""
    about = {"session": question.session, "asked": question.asked}
    return RecordDict(
        {
            "unmask": ConfigRecord({**about, "survivors": [*question.survivors]}),
            "sealed": ConfigRecord(dict(question.sealed)),
            "signatures": ConfigRecord(dict(question.signatures)),
        }
    )


@_reading()
def unpack_unmask(content: RecordDict) -> Unmask:
    """The `Unmask` in a server's message."""
    about = _settings(content, "unmask")
    survivors = about["survivors"]
    if not isinstance(survivors, list) or not all(isinstance(name, str) for name in survivors):
        raise FederationError("its survivors are no list of names")
    return Unmask(
        session=_field(about, "session", str),
        survivors=tuple(map(str, survivors)),
        sealed=_bytes(_settings(content, "sealed")),
        signatures=_bytes(_settings(content, "signatures")),
        asked=_field(about, "asked", str),
    )


def pack_signed(answer: Signed) -> RecordDict:
    """A `Signed` as records."""
    return RecordDict({"signed": ConfigRecord({"signature": answer.signature})})


@_reading()
def unpack_signed(content: RecordDict) -> Signed:
    """The `Signed` in a client's reply."""
    return Signed(_field(_settings(content, "signed"), "signature", bytes))


def pack_opened(opened: Opened) -> RecordDict:
    """An `Opened` as records."""
    return RecordDict({"opened": ConfigRecord(dict(opened.shares))})


@_reading()
def unpack_opened(content: RecordDict) -> Opened:
    """The `Opened` in a client's reply."""
    return Opened(_bytes(_settings(content, "opened")))


def pack_masked(update: MaskedUpdate) -> RecordDict:
    """A `MaskedUpdate` as records; the words travel as signed integers."""
    vector = ArrayRecord({"vector": WireArray(signed(update.words))})
    return RecordDict(
        {
            "update": ConfigRecord({"dtype": MASKED, "num_examples": update.num_examples}),
            "metrics": MetricRecord(dict(update.metrics)),
            "masked": vector,
            "sealed": ConfigRecord(dict(update.sealed)),
        }
    )


def _bytes(record: ConfigRecord) -> dict[str, bytes]:
    return {name: _field(record, name, bytes) for name in record}


def pack_update(update: Update, dtype: str) -> RecordDict:
    """An `Update` as records."""
    content = RecordDict(
        {
            "update": ConfigRecord(
                {"dtype": dtype, "num_examples": update.num_examples, "lost": update.lost}
            ),
            "metrics": MetricRecord(dict(update.metrics)),
        }
    )
    for name, params in {"delta": update.delta, **update.contributed}.items():
        content[name] = pack_params(params, dtype)
    return content


@_reading()
def unpack_update(content: RecordDict) -> Update | MaskedUpdate:
    """The `Update` in a client's reply, or the `MaskedUpdate`.

    Raises:
        FederationError: a record or a field is missing or of the wrong type.
    """
    settings = _settings(content, "update")
    dtype = _field(settings, "dtype", str)
    metrics = content.metric_records.get("metrics")
    if metrics is None:
        raise FederationError("it lacks 'metrics'")
    numbers = {name: float(cast(float, value)) for name, value in metrics.items()}
    if dtype == MASKED:
        words = _arrays(content, "masked")["vector"].numpy()
        if words.dtype not in (np.int32, np.int16) or words.ndim != 1:
            raise FederationError("its masked vector is none")
        return MaskedUpdate(
            words=words.view(f"u{words.itemsize}"),
            sealed=_bytes(_settings(content, "sealed")),
            num_examples=_field(settings, "num_examples", int),
            metrics=numbers,
        )
    _arrays(content, "delta")
    groups = {name: unpack_params(record, dtype) for name, record in content.array_records.items()}
    return Update(
        delta=groups.pop("delta"),
        num_examples=_field(settings, "num_examples", int),
        metrics=numbers,
        contributed=groups,
        lost=_field(settings, "lost", bool),
    )


def pack_query(config: Config) -> RecordDict:
    """The request that asks every node for its name and its number of examples."""
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
    """Round and configuration of an assignment or of a query (round 0), without reading tensors.

    Raises:
        FederationError: the message is neither.
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
        rank=_field(record, "rank", int),
        card=_field(record, "card", str),
    )


def pack_failure(failure: Failure) -> RecordDict:
    """A `Failure` as records."""
    return RecordDict({"failure": ConfigRecord(cast(Mapping[str, Any], asdict(failure)))})  # type: ignore[arg-type]


@_reading()
def unpack_failure(content: RecordDict) -> Failure | None:
    """The `Failure` in a reply, or None if there is none."""
    if "failure" not in content:
        return None
    record = _settings(content, "failure")
    return Failure(
        kind=_field(record, "kind", str),
        reason=_field(record, "reason", str),
        client=_field(record, "client", str),
    )


def pack_scores(scores: Mapping[str, float], num_examples: int) -> RecordDict:
    """A client's scores of the global adapter, and the number of examples scored."""
    return RecordDict({"metrics": MetricRecord({**scores, "num_examples": num_examples})})


def _config_text(config: Config) -> str:
    """The configuration as JSON, without the keys that clients must not see."""
    sections = asdict(config)
    for key in (*_SERVER_ONLY, *adapter_keys()):
        *path, leaf = key.split(".")
        functools.reduce(lambda inner, name: inner[name], path, sections).pop(leaf, None)
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
    if type(value) is not kind:  # not isinstance: bool is not accepted as int
        raise FederationError(f"{name}={_shown(repr(value))} is no {_KINDS[kind]}")
    return value


def _non_negative(record: ConfigRecord, name: str) -> float:
    value = _field(record, name, float)
    if not (math.isfinite(value) and value >= 0):
        raise FederationError(f"{name}={value} is not finite and >= 0")
    return value


def _shown(text: str) -> str:
    """Text of a peer, truncated and on one line."""
    cut = text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
    return cut if cut.isprintable() else repr(cut)[1:-1]
