"""Clients, grids and runs that the tests of the strategies share."""

import numpy as np
from flwr.app import ArrayRecord, Message

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import (
    AlgorithmConfig,
    CommunicationConfig,
    FederationConfig,
)
from fedllm_flwr.federation.messages import ClientInfo, Update
from fedllm_flwr.federation.packing import pack, unpack
from fedllm_flwr.federation.recorder import Recorder
from fedllm_flwr.federation.roster import Client
from fedllm_flwr.federation.rule import Counts
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.federation.strategies import STRATEGIES
from fedllm_flwr.federation.wire import pack_update, unpack_assignment

START = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "b": np.linspace(-1, 1, 4, dtype=np.float32),
}
SIZES = {"ant": 10, "bee": 20, "cat": 40}
NODES = {"ant": 101, "bee": 102, "cat": 103}
ADAPTIVE = {"eta": 0.01, "beta1": 0.9, "beta2": 0.99}
HYPER = {
    "fedavg": {},
    "fedprox": {"mu": 0.01},
    "scaffold": {},
    "fedavgm": {"beta1": 0.9},
    "fedadagrad": {"eta": 0.01},
    "fedyogi": ADAPTIVE,
    "fedadam": ADAPTIVE,
    "local": {},
}


def config_of(name="fedavg", variant="paper", timeout_s=5.0, min_replies=1, **federation):
    federation.setdefault("sample_fraction", 1.0)
    return Config(
        algorithm=AlgorithmConfig(name=name, variant=variant, **HYPER[name]),
        federation=FederationConfig(
            min_replies=min_replies, round_timeout_s=timeout_s, **federation
        ),
        communication=CommunicationConfig(dtype="float32"),
    )


def roster_of(sizes=SIZES):
    return {
        name: Client(NODES.get(name, 1000 + i), ClientInfo(name, size, "0"))
        for i, (name, size) in enumerate(sizes.items())
    }


class Listener(Recorder):
    """Tells the functions given by the names of a recorder's methods."""

    def __init__(self, **methods):
        for name, method in methods.items():
            assert hasattr(Recorder, name)
            setattr(self, name, method)


def server_step(strategy, params, delta, tensors, **contributed):
    """The rule's step on float64 tensors; the new adapter, and what the rule keeps."""
    rule = strategy.rule
    if "control_delta" in rule.contributes:
        zero = {name: np.zeros(value.shape) for name, value in delta.items()}
        contributed = {"control_delta": zero, **contributed}
        tensors = {"control": zero, **tensors}
    state = ServerState(0, params, tensors=tensors)
    after = rule.step(state, {"delta": delta, **contributed}, Counts(1, 1, 1.0))
    return after.params, dict(after.tensors)


def control_step(strategy, control, change):
    """c after a round whose contributions, added up and divided by N, are `change`."""
    _, tensors = server_step(strategy, change, change, {"control": control}, control_delta=change)
    return tensors["control"]


def negative(params):
    return {name: -value for name, value in params.items()}


def update_of(message, name, **changes):
    """A client's honest update: random, but the same for the same client and round."""
    task = unpack_assignment(message.content)
    rng = np.random.default_rng([task.round, *name.encode()])
    draw = {key: rng.normal(size=v.shape).astype(np.float32) for key, v in START.items()}
    fields = {
        "delta": draw,
        "num_examples": min(8, SIZES.get(name, 8)),
        "metrics": {"loss": float(rng.uniform(1, 2))},
        "contributed": {"control_delta": negative(draw)} if "control" in task.sent else {},
    }
    return Update(**{**fields, **changes})


def honest(name):
    return lambda message: Message(
        pack_update(update_of(message, name), "float32"), reply_to=message
    )


def replying(change):
    """A node that sends the honest content of 'bee' after `change` was made to it."""

    def handler(message):
        content = pack_update(update_of(message, "bee"), "float32")
        changed = change(content)
        return Message(content if changed is None else changed, reply_to=message)

    return handler


def nodes_of(bee=None, names=SIZES):
    nodes = {NODES[name]: honest(name) for name in names}
    if bee is not None:
        nodes[NODES["bee"]] = bee
    return nodes


def run(config, grid, rounds=1, state=None, hooks=None, roster=None, known=None):
    """Run to `rounds`; the final state and the report of every round."""
    reports = []
    told = hooks or Listener()
    told.on_round = lambda _state, report: reports.append(report)
    strategy = STRATEGIES[config.algorithm.name](
        config, roster or roster_of(), state or ServerState(0, START), told, known
    )
    strategy.start(grid, ArrayRecord(), num_rounds=rounds)
    return strategy.state, reports


def assert_same_bits(left, right):
    assert left.round == right.round
    accepted = [{n: c for n, c in s.clients.items() if c.round} for s in (left, right)]
    assert accepted[0] == accepted[1]
    assert left.tensors.keys() == right.tensors.keys()
    pairs = [(left.params, right.params)]
    for mine, other in [*pairs, *((left.tensors[k], right.tensors[k]) for k in left.tensors)]:
        assert mine.keys() == other.keys()
        assert all(mine[key].tobytes() == other[key].tobytes() for key in mine)
        assert all(mine[key].dtype == other[key].dtype for key in mine)


def with_value(value):
    array = np.zeros((2, 3), np.float32)
    array[1, 1] = value
    return array


def with_tensors(record, **tensors):
    """A change of a message: tensors of one of its records replaced; None: left out."""

    def change(content):
        arrays = content.array_records[record]
        every = {**unpack(arrays["tensors"]), **tensors}
        arrays["tensors"] = pack((n, value) for n, value in every.items() if value is not None)

    return change


def set_array(name, value):
    return with_tensors("delta", **{name: value})
