"""Replies that cannot be used: refused by name, and the round goes on without them."""

from io import BytesIO

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Failure
from fedllm_flwr.federation.wire import pack_failure
from memory_grid import MemoryGrid, superlink_error
from strategy_runs import (
    SIZES,
    START,
    Listener,
    assert_same_bits,
    config_of,
    honest,
    nodes_of,
    replying,
    roster_of,
    run,
    set_array,
    with_tensors,
    with_value,
)


def set_metrics(**values):
    def change(content):
        content["metrics"] = MetricRecord(values)

    return change


def set_count(value):
    def change(content):
        content["update"] = ConfigRecord({"dtype": "float32", "num_examples": value, "lost": False})

    return change


def corrupt_bytes(content):
    array = content.array_records["delta"]["tensors"]
    array.data = array.data[:-1]


def pickled(content):
    value = np.array([{"a": 1}], dtype=object)
    data = BytesIO()
    np.save(data, value, allow_pickle=True)
    array = Array("object", (1,), "numpy.ndarray", data.getvalue())
    content["delta"] = ArrayRecord({"tensors": array})


BAD = {
    "nan": (set_array("a", with_value(np.nan)), "'a' holds NaN"),
    "inf": (set_array("a", with_value(np.inf)), "'a' holds Inf"),
    "huge": (set_array("a", with_value(1e20)), "'a' holds 1e+20"),
    "foreign": (set_array("evil", np.zeros(2, np.float32)), "'evil' is not a tensor"),
    "missing": (set_array("b", None), "'b' is missing"),
    "shape": (set_array("a", np.zeros((3, 2), np.float32)), "'a' has shape (3, 2)"),
    "broadcast": (set_array("a", np.zeros((1, 3), np.float32)), "'a' has shape (1, 3)"),
    "int": (set_array("a", np.zeros((2, 3), np.int64)), "'a' has dtype '<i8'"),
    "double": (set_array("a", np.zeros((2, 3))), "'a' has dtype '<f8'"),
    "bytes": (corrupt_bytes, "its layout is longer than itself"),
    "pickle": (pickled, "its tensors are of the format 'numpy.ndarray'"),
    "arrays": (
        lambda c: c.__setitem__("delta", ArrayRecord()),
        "its arrays are [] instead of ['tensors']",
    ),
    "no delta": (lambda c: c.pop("delta") and None, "lacks"),
    "no metrics": (lambda c: c.pop("metrics") and None, "lacks"),
    "no update": (lambda c: c.pop("update") and None, "lacks"),
    "empty": (lambda c: RecordDict(), "lacks"),
    "count 0": (set_count(0), "num_examples=0 is not in 1..20"),
    "count -1": (set_count(-1), "num_examples=-1 is not in 1..20"),
    "count too many": (set_count(10**15), "num_examples=1000000000000000 is not in 1..20"),
    "count float": (set_count(3.5), "num_examples=3.5 is no whole number"),
    "count text": (set_count("7"), "num_examples='7' is no whole number"),
    "count bool": (set_count(True), "num_examples=True is no whole number"),
    "count list": (set_count([7]), "num_examples=[7] is no whole number"),
    "dtype": (
        lambda c: c.__setitem__("update", ConfigRecord({"dtype": "int8", "num_examples": 1})),
        "unknown wire dtype 'int8'",
    ),
    "no loss": (set_metrics(accuracy=1.0), "contain no 'loss'"),
    "nan loss": (set_metrics(loss=float("nan")), "its loss is nan"),
    "infinite loss": (set_metrics(loss=float("inf")), "its loss is inf"),
    "loss beyond sums": (set_metrics(loss=-1.7e308), "its loss is -1.7e+308, not within 1e+12"),
    "nan metric": (set_metrics(loss=1.0, margin=float("nan")), "its margin is nan"),
    "negative seconds": (set_metrics(loss=1.0, seconds=-1e13), "its seconds is -1e+13"),
    "long name": (set_metrics(loss=1.0, **{"m" * 10**6: 1.0}), "(1000000 characters)"),
    "formula": (set_metrics(**{"loss": 1.0, "=1+1": 1.0}), "a metric named '=1+1' (4 characters)"),
    "list loss": (set_metrics(loss=[1.0]), "cannot be read (TypeError"),
    "many metrics": (
        set_metrics(loss=1.0, **{f"m{i}": 1.0 for i in range(100)}),
        "101 metrics",
    ),
    "failure": (
        lambda c: pack_failure(Failure("memory", "no room\x1b[2J for the model\nsecond line")),
        "no room[2J for the model",
    ),
    "broken failure": (
        lambda c: RecordDict({"failure": ConfigRecord({"kind": "x"})}),
        "an unreadable failure: it lacks 'reason'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_update_is_refused_by_name_and_the_round_goes_on(case):
    change, expected = BAD[case]
    state, (report,) = run(config_of(), MemoryGrid(nodes_of(replying(change))))
    assert list(report.failures) == ["bee"]
    assert expected in report.failures["bee"]
    assert set(report.metrics) == {"ant", "cat"}
    others = {name: SIZES[name] for name in ("ant", "cat")}
    alone, _ = run(config_of(), MemoryGrid(nodes_of(names=others)), roster=roster_of(others))
    assert_same_bits(state, alone)


@pytest.mark.parametrize("case", ["missing", "nan", "shape"])
def test_bad_control_variate_leaves_both_sums_alone(case):
    def change(content):
        if case == "missing":
            del content["control_delta"]
        else:
            value = with_value(np.nan) if case == "nan" else np.zeros(2, np.float32)
            with_tensors("control_delta", a=value)(content)

    state, (report,) = run(config_of("scaffold"), MemoryGrid(nodes_of(replying(change))))
    assert "control variate" in report.failures["bee"]
    silent, _ = run(
        config_of("scaffold", timeout_s=0.1), MemoryGrid(nodes_of(lambda message: None))
    )
    assert_same_bits(state, silent)


def test_error_of_the_client_app():
    def crash(message):
        return Message(Error(2, "Traceback: out of memory\nmore"), reply_to=message)

    _, (report,) = run(config_of(), MemoryGrid(nodes_of(crash)))
    assert report.failures == {"bee": "error 2: Traceback: out of memory"}


def test_error_of_the_superlink_is_the_clients():
    def lost(message):
        return superlink_error(message.metadata.message_id, 5, "Node Unavailable")

    _, (report,) = run(config_of(), MemoryGrid(nodes_of(lost)))
    assert report.failures == {
        "bee": "its SuperNode gave no sign of life for a minute; start it, or check the network"
    }
    assert report.ignored == []


def test_no_reply_in_time():
    grid = MemoryGrid(nodes_of(lambda message: None))
    _, (report,) = run(config_of(timeout_s=0.3), grid)
    assert report.failures == {"bee": "no reply within 0.3 s"}
    assert 0.3 <= report.seconds < 1.5
    assert 2 < grid.pulls < 30


def test_late_reply_is_waited_for():
    calls = []

    def slow(message):
        calls.append(message)
        return honest("bee")(message) if len(calls) > 3 else None

    _, (report,) = run(config_of(), MemoryGrid(nodes_of(slow)))
    assert report.failures == {}
    assert set(report.metrics) == set(SIZES)


@pytest.mark.parametrize("gaps", [True, False])
def test_node_that_left_is_named_and_the_others_are_not_mixed_up(gaps):
    nodes = nodes_of(names={"bee": 20, "cat": 40})
    _, (report,) = run(config_of(), MemoryGrid(nodes, gaps=gaps))
    assert report.failures == {"ant": "not connected"}
    rng = np.random.default_rng([1, *b"cat"])
    for value in START.values():
        rng.normal(size=value.shape)
    assert report.metrics["cat"] == {"loss": float(rng.uniform(1, 2))}


def test_second_reply_is_ignored():
    def twice(message):
        return [honest("bee")(message), replying(set_array("a", with_value(7.0)))(message)]

    state, (report,) = run(config_of(), MemoryGrid(nodes_of(twice)))
    once, _ = run(config_of(), MemoryGrid(nodes_of()))
    assert_same_bits(state, once)
    assert report.failures == {}
    assert report.ignored == ["a second reply of bee"]


def test_reply_to_no_message_of_the_round_is_ignored():
    def forged(message):
        stray = honest("bee")(message)
        stray.metadata.__dict__["_reply_to_message_id"] = "message-999"
        stray.metadata.__dict__["_src_node_id"] = 4711
        return [stray, honest("bee")(message)]

    _, (report,) = run(config_of(), MemoryGrid(nodes_of(forged)))
    assert report.failures == {}
    assert report.ignored == ["a reply of node 4711 to no message of this round"]


def test_reply_in_another_clients_name_is_ignored():
    def impostor(message):
        reply = honest("bee")(message)
        reply.metadata.__dict__["_src_node_id"] = 103
        return reply

    _, (report,) = run(config_of(timeout_s=0.1), MemoryGrid(nodes_of(impostor)))
    assert report.ignored == ["a reply for bee that node 103 sent"]
    assert set(report.metrics) == {"ant", "cat"}


def test_too_few_replies_end_the_run_and_name_clients_and_reasons():
    grid = MemoryGrid(nodes_of(replying(BAD["nan"][0]), names={"bee": 20, "cat": 40}))
    failed = []
    with pytest.raises(FederationError) as error:
        run(config_of(min_replies=2), grid, hooks=Listener(on_failed_round=failed.append))
    assert [sorted(report.failures) for report in failed] == [["ant", "bee"]]
    assert str(error.value) == (
        "round 1: 1 of 3 replies could be used, federation.min_replies=2. "
        "ant: not connected; bee: 'a' holds NaN"
    )


@pytest.mark.parametrize(
    ("asked", "usable", "goes_on"),
    [(1, 1, True), (2, 2, True), (2, 1, False), (3, 2, True), (4, 2, False), (4, 3, True)],
)
def test_a_round_needs_more_than_half_of_those_asked(asked, usable, goes_on):
    """One survivor of four would take the step of a whole round."""
    names = {f"client-{i}": 10 for i in range(asked)}
    roster = roster_of(names)
    nodes = {
        client.node_id: honest(name) if i < usable else lambda message: None
        for i, (name, client) in enumerate(roster.items())
    }
    config = config_of(min_replies=None, timeout_s=0.1)
    if goes_on:
        state, _ = run(config, MemoryGrid(nodes), roster=roster)
        assert state.round == 1
        return
    needed = asked // 2 + 1
    with pytest.raises(FederationError, match=rf"{usable} of {asked} .*min_replies={needed}\. "):
        run(config, MemoryGrid(nodes), roster=roster)


def test_more_replies_wanted_than_clients_sampled():
    with pytest.raises(FederationError, match=r"min_replies=3 exceeds the 2 of 3 clients"):
        run(config_of(min_replies=3, sample_clients=2), MemoryGrid(nodes_of()))
