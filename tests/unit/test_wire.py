"""What may travel, what never does, and what a hostile peer's message becomes."""

import io
import json
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import compose
from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation import packing
from fedllm_flwr.federation.messages import Assignment, ClientInfo, Update
from fedllm_flwr.federation.updates.cast import wire_bytes
from fedllm_flwr.federation.wire import (
    pack_assignment,
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

PARAMS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
CONFIG = compose()


def task_content() -> RecordDict:
    return pack_assignment(Assignment(3, PARAMS, 1e-3, CONFIG, {"control": PARAMS}))


def update_content() -> RecordDict:
    return pack_update(Update(PARAMS, 5, {"loss": 1.0}, {"control_delta": PARAMS}), "bfloat16")


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


STYPE = packing.pack([]).stype
ARRAYS = {
    "int": packing.pack([("a", np.ones(2, np.int64))]),
    "float32 where bfloat16 is announced": packing.pack([("a", np.ones(2, np.float32))]),
    "big-endian": packing.pack([("a", np.ones(2, ">i2"))]),
    "no bytes": Array("uint8", (0,), STYPE, b""),
    "cut short": Array("uint8", (2,), STYPE, packing.pack([("a", np.ones(99, np.int16))]).data[5:]),
    "NumPy's": Array(np.ones(2, np.int16)),
    "pickle": Array("int16", (1,), "numpy.ndarray", npy(np.array([{}]), allow_pickle=True)),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_bad_array_is_refused(case: str) -> None:
    for content, read, name in (
        (task_content(), unpack_assignment, "params"),
        (task_content(), unpack_assignment, "control"),
        (update_content(), unpack_update, "delta"),
        (update_content(), unpack_update, "control_delta"),
    ):
        content[name] = ArrayRecord({"tensors": ARRAYS[case]})
        with pytest.raises(FederationError):
            read(content)


def test_array_that_lies_about_its_dtype_is_named() -> None:
    record = pack_params(PARAMS, "float32")

    with pytest.raises(FederationError, match="'a' has dtype float32, announced as bfloat16"):
        unpack_params(record, "bfloat16")
    with pytest.raises(FederationError, match="unknown wire dtype 'int8'; use float32, "):
        unpack_params(record, "int8")


def test_float16_refuses_what_it_cannot_hold_and_passes_nan_and_inf() -> None:
    with pytest.raises(FederationError, match=r"'a' .*dtype=float16 .*use bfloat16"):
        pack_params({"a": np.array([65520.0], np.float32)}, "float16")

    odd = {"a": np.array([np.nan, np.inf, -np.inf, 65504.0], np.float32)}
    np.testing.assert_array_equal(
        unpack_params(pack_params(odd, "float16"), "float16")["a"], odd["a"]
    )


FIELDS = {
    "task": [
        "round",
        "learning_rate",
        "dtype",
        "config",
    ],
    "update": ["dtype", "num_examples", "lost"],
    "acknowledged": ["round", "updates"],
    "query": ["config", "version"],
    "info": ["name", "num_examples", "version"],
    "failure": ["kind", "reason", "client"],
}
MESSAGES: dict[str, tuple[Callable[[], RecordDict], Callable[[RecordDict], Any]]] = {
    "task": (task_content, unpack_assignment),
    "acknowledged": (task_content, unpack_assignment),
    "update": (update_content, unpack_update),
    "query": (lambda: pack_query(CONFIG), unpack_query),
    "info": (lambda: pack_info(ClientInfo("ann", 3, "0.1")), unpack_info),
    "failure": (
        lambda: RecordDict({"failure": ConfigRecord({"kind": "x", "reason": "y", "client": "z"})}),
        unpack_failure,
    ),
}
ALL_FIELDS = [(message, field) for message, fields in FIELDS.items() for field in fields]


@pytest.mark.parametrize(("message", "field"), ALL_FIELDS)
def test_missing_or_mistyped_field_is_named(message: str, field: str) -> None:
    pack, unpack = MESSAGES[message]
    assert unpack(pack()) is not None

    content = pack()
    del content.config_records[message][field]
    with pytest.raises(FederationError, match=f"it lacks '{field}'"):
        unpack(content)
    for wrong in ([1, 2], b"bytes", ["a\nb" * 1000]):
        content.config_records[message][field] = wrong
        with pytest.raises(FederationError, match=f"{field}=.* is no ") as caught:
            unpack(content)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("message", "record"),
    [
        ("task", "task"),
        ("task", "params"),
        ("task", "acknowledged"),
        ("update", "update"),
        ("update", "delta"),
        ("update", "metrics"),
        ("query", "query"),
        ("info", "info"),
    ],
)
def test_missing_record_or_one_of_another_kind_is_named(message: str, record: str) -> None:
    pack, unpack = MESSAGES[message]
    content = pack()
    del content[record]
    with pytest.raises(FederationError, match=f"it lacks '{record}'"):
        unpack(content)

    content[record] = ConfigRecord() if record in ("params", "delta") else ArrayRecord()
    with pytest.raises(FederationError, match=f"it lacks '{record}'"):
        unpack(content)


def test_failure_of_another_kind_is_refused() -> None:
    with pytest.raises(FederationError, match="it lacks 'failure'"):
        unpack_failure(RecordDict({"failure": MetricRecord({"kind": 1})}))


@pytest.mark.parametrize(
    ("record", "field", "value", "expected"),
    [
        ("task", "round", -1, "round=-1"),
        ("task", "round", True, "round=True is no whole number"),
        ("task", "round", 1.0, "round=1.0 is no whole number"),
        ("task", "learning_rate", float("nan"), "learning_rate=nan"),
        ("task", "learning_rate", float("inf"), "learning_rate=inf"),
        ("task", "learning_rate", -1.0, "learning_rate=-1.0"),
        ("task", "learning_rate", "1", "learning_rate='1' is no number"),
        ("task", "dtype", "float64", "unknown wire dtype 'float64'"),
        ("acknowledged", "round", 4, r"Acknowledged(round=4, updates=0) is not of round 3"),
        ("acknowledged", "updates", 1, r"Acknowledged(round=0, updates=1) is not of round 3"),
        ("acknowledged", "updates", -1, r"Acknowledged(round=0, updates=-1) is not of round 3"),
        ("update", "lost", 0, "lost=0 is no truth value"),
        ("update", "num_examples", "7", "num_examples='7' is no whole number"),
        ("update", "num_examples", 7.0, "num_examples=7.0 is no whole number"),
        ("update", "num_examples", False, "num_examples=False is no whole number"),
        ("update", "dtype", "int8\n", r"unknown wire dtype 'int8\n'"),
    ],
)
def test_absurd_value_is_refused(record: str, field: str, value: Any, expected: str) -> None:
    pack, unpack = MESSAGES[record]
    content = pack()
    content.config_records[record][field] = value

    with pytest.raises(FederationError, match=re.escape(expected)):
        unpack(content)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"x"',
        "[" * 100_000,
        '{"seed": ' + "9" * 5000 + "}",
        '{"seed": NaN}',
        '{"training": {"learning_rate": Infinity}}',
        '{"training": {"learning_rate": 1e999}}',
        '{"training": {"learning_rate": "1"}}',
        '{"training": {"new_option": 1}}',
        '{"trust_remote_code": true}',
        '{"model": {"trust_remote_code": true}}',
        '{"model": {"path": "a\\u0000b"}}',
        '{"model": {"path": {"_target_": "os.system"}}}',
        '{"training": {"optimizer": "torch.optim.Adam"}}',
        '{"data": {"template": "${oc.env:HOME}"}}',
    ],
)
def test_broken_or_foreign_configuration_is_refused(text: str) -> None:
    query = RecordDict({"query": ConfigRecord({"version": __version__, "config": text})})
    task = task_content()
    task.config_records["task"]["config"] = text

    for content, unpack in ((query, unpack_query), (task, unpack_assignment)):
        with pytest.raises(FederationError) as caught:
            unpack(content)
        assert str(caught.value).isprintable()


def test_option_of_a_newer_server_is_named() -> None:
    newer = {**asdict(CONFIG), "tomorrow": {"key": 3.0}}
    question = ConfigRecord({"version": __version__, "config": json.dumps(newer)})
    content = RecordDict({"query": question})

    with pytest.raises(FederationError, match=r"unknown key 'tomorrow'.*the same fedllm-flwr"):
        unpack_query(content)


@pytest.mark.parametrize("value", [[1.0], []])
def test_metrics_are_numbers(value: Any) -> None:
    content = update_content()
    content["metrics"] = MetricRecord({"loss": value})

    with pytest.raises(FederationError, match="cannot be read"):
        unpack_update(content)


def test_what_concerns_the_server_alone_does_not_travel() -> None:
    config = replace(
        CONFIG,
        output_dir="/srv/secret-1",
        resume="/srv/secret-2",
        init_adapter="/srv/secret-3",
        tracking=replace(CONFIG.tracking, project="secret-4"),
        federation=replace(CONFIG.federation, ray_address="secret-5:6379"),
    )

    for content, record in (
        (pack_query(config), "query"),
        (pack_assignment(Assignment(1, PARAMS, 1e-3, config)), "task"),
    ):
        assert "secret" not in str(content.config_records[record])
        question = ConfigRecord({"version": __version__, "config": content[record]["config"]})
        received = unpack_query(RecordDict({"query": question}))
        assert received == CONFIG


def test_settings_of_training_and_data_travel() -> None:
    config = compose(
        ["training.max_steps=7", "lora.target_modules=[q_proj]", "data.columns.label=desk"]
    )

    received: Config = unpack_query(pack_query(config))

    assert received == config


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_bytes_are_those_of_the_arrays(dtype: str, size: int) -> None:
    record = pack_params(PARAMS, dtype)

    assert wire_bytes(PARAMS, dtype) == 10 * size
    (array,) = record.values()
    assert sum(values.nbytes for values in packing.unpack(array).values()) == 10 * size
    assert len(array.data) < 10 * size + 100


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_packing_holds_the_message_and_the_work_of_one_tensor(dtype: str) -> None:
    params = {f"layer {i}": np.ones((256, 1024), np.float32) for i in range(16)}  # 1 MiB each
    tensor = 2**20

    tracemalloc.start()
    record = pack_params(params, dtype)
    _, packing = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    held, _ = tracemalloc.get_traced_memory()
    received = unpack_params(record, dtype)
    _, unpacking = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert packing < wire_bytes(params, dtype) + 6 * tensor
    assert unpacking - held < len(received) * tensor + 6 * tensor
